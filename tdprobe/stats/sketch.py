"""Random maps onto fewer columns, the same in every process, and what they do to Frobenius products."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.hashing import mix64


@lru_cache(maxsize=512)
def sketch_map(width: int, columns: int, seed: int, layer: int) -> Float[Tensor, "d k"]:
    """Draw the map of a layer onto a random subspace, scaled so that it keeps lengths on average.

    ``W = sqrt(d / k) Q`` with the columns of Q orthonormal and uniformly distributed, so ``E W W' = I``. It depends
    on nothing but the arguments: sums over sketched rows of any process merge.

    Args:
        width: Columns of the layer, d.
        columns: Columns to keep, k < d.
        seed: Seed of all maps.
        layer: Place of the layer; every layer has a map of its own.

    Returns:
        ``(d, k)`` float32. Callers must not write to it.

    Example:
        >>> w = sketch_map(100, 20, seed=0, layer=3)
        >>> (w.mT @ w).allclose(5 * torch.eye(20), atol=1e-5)
        True

    References:
        Johnson, Lindenstrauss 1984, Extensions of Lipschitz mappings into a Hilbert space.
    """
    # Equal seeds of neighbouring layers must not give related maps.
    mixed = int(mix64(torch.tensor(seed, device="cpu") ^ mix64(torch.tensor(layer, device="cpu"))))
    generator = torch.Generator().manual_seed(mixed)
    normal = torch.randn(width, columns, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(normal)
    # Without the signs of R the columns of Q would not be uniform, and would depend on the solver.
    return (q * r.diagonal().sign() * (width / columns) ** 0.5).float()


def fourth_moments(width: int, columns: int) -> tuple[float, float]:
    """Return a and b of ``E[M_pq M_rs] = a [pq][rs] + b ([pr][qs] + [ps][qr])`` for ``M = W W'``.

    Hence, for a symmetric S: ``E tr(M S)^2 = a tr(S)^2 + 2 b |S|^2`` and
    ``E |W' S W|^2 = (a + b) |S|^2 + b tr(S)^2``. A map that keeps all columns has a = 1 and b = 0.

    Args:
        width: Columns of the layer, d.
        columns: Columns of the sketch, k.

    Example:
        >>> fourth_moments(8, 8), fourth_moments(10**6, 10)[1]  # 1 / k for normal maps onto k columns
        ((1.0, 0.0), 0.0999...)

    References:
        Collins, Sniady 2006, Integration with respect to the Haar measure on unitary, orthogonal and symplectic group.
    """
    d, k = float(width), float(columns)
    if columns >= width:
        return 1.0, 0.0
    b = (d / k) * (d - k) / ((d + 2) * (d - 1))
    # From tr M = d, which is certain: a d + 2 b = d.
    return 1 - 2 * b / d, b
