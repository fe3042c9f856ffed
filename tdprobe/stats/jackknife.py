"""Standard errors of any score, from what it is without one group of rows after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Float


def jackknife_se(
    whole: Float[Tensor, "*s"], without: Float[Tensor, "g *s"], sizes: Float[Tensor, "g"]
) -> Float[Tensor, "*s"]:
    """Estimate the standard error of a score by leaving out one group of rows at a time.

    With ``h_j = n / m_j`` and the pseudovalues ``p_j = h_j t - (h_j - 1) t_j``:
    ``se^2 = 1/g sum_j (p_j - t_J)^2 / (h_j - 1)``, where ``t_J = sum_j p_j / h_j`` is the jackknife estimate. For the
    mean of single rows this is ``s / sqrt(n)``. Groups may differ in size, and empty ones do not count.

    Args:
        whole: The score of all rows.
        without: The score without each group.
        sizes: Rows of each group.

    Returns:
        The standard error, NaN with fewer than two groups.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
        >>> se = jackknife_se(x.mean(), (x.sum() - x) / 3, torch.ones(4, dtype=torch.float64))
        >>> bool(torch.isclose(se, x.std() / 2))
        True

    References:
        Busing, Meijer, van der Leeden 1999, Delete-m jackknife for unequal m.
    """
    used = sizes > 0
    without, sizes = without[used].double(), sizes[used].double().to(whole.device)
    groups = len(sizes)
    if groups < 2:
        return torch.full_like(whole, torch.nan, dtype=torch.float64)
    h = (sizes.sum() / sizes).reshape(groups, *[1] * whole.ndim)
    pseudo = h * whole.double() - (h - 1) * without
    centre = (pseudo / h).sum(0)
    return ((pseudo - centre).square() / (h - 1)).mean(0).sqrt()


def mean_se(sums: Float[Tensor, "g *s"], sizes: Float[Tensor, "g"]) -> Float[Tensor, "*s"]:
    """Estimate the standard error of a mean over rows from the sum of each group of rows.

    Groups that hold whole texts, or whole portions of a stream, take in what their rows have in common.

    Args:
        sums: Sum over the rows of each group.
        sizes: Rows of each group.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
        >>> bool(torch.isclose(mean_se(x, torch.ones(4)), x.std() / 2))
        True
    """
    sizes = sizes.double()
    shaped = sizes.reshape(-1, *[1] * (sums.ndim - 1))
    n, total = sizes.sum(), sums.double().sum(0)
    return jackknife_se(total / n, (total - sums.double()) / (n - shaped), sizes)
