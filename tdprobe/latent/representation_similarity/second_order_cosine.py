"""Second-order cosine similarity: whether rows are similar to their neighbours in the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.latent.representation_similarity.neighborhood_estimator import Metric, NeighborhoodEstimator
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighborhoods import Neighborhoods


@register(
    Spec(
        name="second_order_cosine",
        kind="pair",
        symmetric=True,
        bounds=(-1.0, 1.0),
        larger_means="more similar cosines to neighbours",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling"}),
        needs=("reservoir",),
        cost="2 n^2 d per layer and n k per pair, for a bank of n rows",
        reference="Hamilton et al. 2016, Cultural shift or linguistic drift?",
    )
)
class SecondOrderCosineEstimator(NeighborhoodEstimator):
    """Measure whether rows are as similar to their neighbours in one representation as in the other.

    With ``U(i)`` the k nearest neighbours of row i in either representation, and ``s_A(i)`` its cosines with them in A:
    ``1 / n * sum_i cos(s_A(i), s_B(i))``. A row of zeros has no direction: its cosines are 0, and its term is 0.

    Equal rows are each other's nearest neighbours, and tied rows share the places that are left: of two shares of one
    row the larger is in the union. So the order of rows never matters.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k: Neighbours, 1 or more.
        metric: What is near: ``"cosine"`` as in the paper, or ``"euclidean"``.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``; they agree.

    Raises:
        ConfigError: A bad key, ``k`` below 1, an unknown metric or mode.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.randn(50, 3)
        >>> td = SecondOrderCosineEstimator()(TensorDict({"data_a": x, "data_b": -2 * x}))
        >>> bool(td["second_order_cosine"] > 0.999)
        True

    References:
        Hamilton, Leskovec, Jurafsky 2016, Cultural shift or linguistic drift? Comparing two computational measures of
        semantic change.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "second_order_cosine",
        k: int = 10,
        metric: Metric = "cosine",
        *,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        super().__init__([in_key_a, in_key_b], out_key, k, metric, bank_size=bank_size, mode=mode)

    def _terms(self, hoods: Neighborhoods, data: list[Tensor]) -> Float[Tensor, "r l l"]:
        # [a, b]: cosines in layer a with the neighbours in layer b.
        cosines = torch.stack([hoods.gathered(_cosines(x, hoods.rows)) for x in data])
        own = cosines.diagonal().movedim(-1, 0)
        found = []
        for a in range(len(data)):
            # Over the union: all neighbours in a, and what a has not of those in b.
            here, there = hoods.share[a], hoods.share - hoods.common(a)
            dots = (here * own[a] * cosines[:, a]).sum(-1) + (there * cosines[a] * own).sum(-1)
            first = (here * own[a].square()).sum(-1) + (there * cosines[a].square()).sum(-1)
            second = (here * cosines[:, a].square()).sum(-1) + (there * own.square()).sum(-1)
            found.append(torch.where(first * second > 0, dots / (first * second).sqrt(), 0))
        terms = torch.stack(found).movedim(-1, 0)
        # The same sums in another order.
        return (terms + terms.mT) / 2


def _cosines(x: Float[Tensor, "n d"], rows: Int[Tensor, "r"]) -> Float[Tensor, "r m"]:
    """Return the cosines of some rows with all rows, float64, and a last column of zeros."""
    x = torch.nn.functional.normalize(x.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
    return torch.nn.functional.pad(x[rows] @ x.mT, (0, 1))
