"""Mutual nearest neighbours: how many of the k nearest rows two representations have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.representation_similarity.neighborhood_estimator import Metric, NeighborhoodEstimator
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighborhoods import Neighborhoods


@register(
    Spec(
        name="mutual_knn",
        kind="pair",
        symmetric=True,
        bounds=(0.0, 1.0),
        larger_means="more common neighbours",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n k per pair, for a bank of n rows",
        reference="Huh et al. 2024, The platonic representation hypothesis",
    )
)
class MutualKnnEstimator(NeighborhoodEstimator):
    """Measure how many of the k nearest neighbours of a row are the same in two representations.

    ``1 / n * sum_i |N_A(i) & N_B(i)| / k``. Of n rows, ``k / (n - 1)`` are common by chance; with ``adjusted`` that is
    0 and complete agreement still 1: ``(m - c) / (1 - c)``, as in the adjusted Rand index.

    Equal rows are each other's nearest neighbours, and tied rows share the places that are left: of two shares of one
    row the smaller is common. So the order of rows never matters, and a constant layer has in common what chance has.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k: Neighbours, 1 or more.
        metric: ``"euclidean"``, or ``"cosine"`` as in the paper, which translation changes.
        adjusted: Adjust for chance; by default with ``mode="robust"`` only.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``, which adjusts for chance.

    Raises:
        ConfigError: A bad key, ``k`` below 1, an unknown metric or mode.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.arange(12.0).square().unsqueeze(1)
        >>> MutualKnnEstimator(k=2)(TensorDict({"data_a": x, "data_b": 3 - x}))["mutual_knn"]
        tensor(1.)

    References:
        Huh, Cheung, Wang, Isola 2024, The platonic representation hypothesis.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "mutual_knn",
        k: int = 10,
        metric: Metric = "euclidean",
        *,
        adjusted: bool | None = None,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        super().__init__([in_key_a, in_key_b], out_key, k, metric, bank_size=bank_size, mode=mode)
        self.adjusted = adjusted

    def _terms(self, hoods: Neighborhoods, data: list[Tensor]) -> Float[Tensor, "r l l"]:
        return hoods.overlap() / self.k

    def _scaled(self, score: Tensor, se: Tensor, n: int) -> tuple[Tensor, Tensor]:
        adjusted = self.mode == "robust" if self.adjusted is None else self.adjusted
        chance = self.k / (n - 1) * adjusted
        return (score - chance) / (1 - chance), se / (1 - chance)
