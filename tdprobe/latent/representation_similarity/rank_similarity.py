"""Rank similarity: common neighbours, and whether they are equally near."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.representation_similarity.neighborhood_estimator import Metric, NeighborhoodEstimator
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighborhoods import Neighborhoods


@register(
    Spec(
        name="rank_similarity",
        kind="pair",
        symmetric=True,
        bounds=(0.0, 1.0),
        larger_means="more similar order of neighbours",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n k per pair, for a bank of n rows",
        reference="Wang et al. 2020, Towards understanding the instability of network embedding",
    )
)
class RankSimilarityEstimator(NeighborhoodEstimator):
    """Measure whether the common ones of the k nearest neighbours of a row have similar ranks in two representations.

    With ``C(i)`` the common neighbours, ``a`` and ``b`` their ranks from 1 to k, and ``H`` the harmonic numbers:
    ``1 / n * sum_i 1 / H(|C(i)|) * sum_C(i) 2 / ((1 + |a - b|) (a + b))``; a row without common neighbours counts 0.

    Equal rows are each other's nearest neighbours. Tied rows share the places that are left, and have the harmonic mean
    of these places for their rank, so that the order of rows never matters and a layer scores 1 with itself.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k: Neighbours, 1 or more.
        metric: ``"euclidean"``, or ``"cosine"``, which translation changes.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``; they agree.

    Raises:
        ConfigError: A bad key, ``k`` below 1, an unknown metric or mode.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.arange(12.0).square().unsqueeze(1)
        >>> RankSimilarityEstimator(k=2)(TensorDict({"data_a": x, "data_b": 3 - x}))["rank_similarity"]
        tensor(1.)

    References:
        Wang, Rao, Chen, Wang 2020, Towards understanding the instability of network embedding.
        Klabunde, Schumacher, Strohmaier, Lemmerich 2023, Similarity of neural network models.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "rank_similarity",
        k: int = 10,
        metric: Metric = "euclidean",
        *,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        super().__init__([in_key_a, in_key_b], out_key, k, metric, bank_size=bank_size, mode=mode)

    def _terms(self, hoods: Neighborhoods, data: list[Tensor]) -> Float[Tensor, "r l l"]:
        found = [self._from(hoods, layer) for layer in range(len(hoods.other))]
        terms = torch.stack(found).movedim(-1, 0)
        # The same sum in another order.
        return (terms + terms.mT) / 2

    def _from(self, hoods: Neighborhoods, layer: int) -> Float[Tensor, "l r"]:
        common, own = hoods.common(layer), hoods.looked_up(layer, hoods.rank[layer])
        alike = 2 / ((1 + (own - hoods.rank).abs()) * (own + hoods.rank))
        count = common.sum(-1)
        # Harmonic numbers, for whole shares and parts of them alike.
        most = torch.digamma(count + 1) - torch.digamma(torch.ones_like(count))
        return torch.where(count > 0, (common * alike).sum(-1) / most, 0)
