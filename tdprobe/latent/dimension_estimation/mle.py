"""Intrinsic dimension by maximum likelihood from the k nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.dimension_estimation.neighbor_dimension import (
    SPREAD,
    NeighborDimension,
    counted,
    median,
    suffixed,
)
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighbors import Neighbors, as_neighbors

Combine = Literal["pooled", "average", "median"]


@register(
    Spec(
        name="mle",
        kind="layer",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer, for a bank of n rows",
        reference="Levina, Bickel 2004, Maximum likelihood estimation of intrinsic dimension",
    )
)
class MleDimensionEstimator(NeighborDimension):
    """Estimate the dimension by maximum likelihood from the distances to the k nearest neighbours.

    In a ball of constant density around a point the ``r_j`` are those of a Poisson process; observed up to the k-th,
    ``1 / d(x) = 1 / (k - 1) * sum_j<k log(r_k / r_j)``. Pooled over points it is ``1 / d`` that is averaged, which is
    the maximum of the joint likelihood; the average of ``d(x)`` itself, as first proposed, is biased upwards.

    Rows that are equal count once. Points with fewer than k distinct neighbours do not count.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k: Neighbours, 2 or more.
        combine: ``"pooled"``, ``"average"`` or ``"median"`` over points.
        return_pointwise: Also write ``d(x)``, ``(*lead, n)`` float32, under the out key followed by ``_pointwise``.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``; they agree.

    Raises:
        ConfigError: A bad key, ``k`` below 2, an unknown way to combine or mode.

    Example:
        >>> square = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> abs(float(MleDimensionEstimator()(TensorDict({"data": square}))["dimension"]) - 2) < 0.2
        True

    References:
        Levina, Bickel 2004, Maximum likelihood estimation of intrinsic dimension.
        MacKay, Ghahramani 2005, Comments on "Maximum likelihood estimation of intrinsic dimension" (pooled).
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "dimension",
        k: int = 20,
        combine: Combine = "pooled",
        return_pointwise: bool = False,
        *,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        keys = [out_key, suffixed(out_key, "_pointwise")] if return_pointwise else [out_key]
        super().__init__(in_key, keys, bank_size=bank_size, mode=mode)
        if isinstance(k, bool) or not isinstance(k, int) or k < 2:
            raise ConfigError(f"got k={k!r}; allowed are integers from 2 on, such as 20")
        if combine not in get_args(Combine):
            raise ConfigError(unknown("way to combine points", combine, get_args(Combine)))
        self.k, self.combine, self.return_pointwise = k, combine, return_pointwise

    def derivation(self, state: Any) -> Neighbors:
        """Ask for the first k neighbours."""
        return Neighbors(tuple(range(1, self.k + 1)))

    def score(self, state: Any) -> TensorDict:
        """Estimate the dimension of each layer.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"`` and its standard error ``"se"``, ``(*lead, l)`` float64:
            ``1.5 d / sqrt(points (k - 1))``; ``"pointwise"``, ``(*lead, l, n)`` in the order of the sample ids;
            ``"duplicates"`` and ``"finite"``.

        Raises:
            ConfigError: Fewer than k + 1 rows.
        """
        self._require(state, self.k + 1, f"k={self.k}")
        table = as_neighbors(state, self.derivation(state))
        valid = counted(table, self.k)
        farthest = table.at(self.k).log()
        logs = torch.zeros_like(farthest)
        for rank in range(1, self.k):
            # One by one, so that equal distances add exactly 0.
            logs += farthest - table.at(rank).log()
        inverse = logs / (self.k - 1)
        pointwise = torch.where(farthest < torch.inf, 1 / inverse, torch.nan)
        score = self._combined(inverse.masked_fill(~valid, torch.nan))
        return self._scores(
            table,
            score=score,
            se=SPREAD * score / (valid.sum(-1).double() * (self.k - 1)).sqrt(),
            pointwise=pointwise[..., table.ids.argsort()],
        )

    def _combined(self, inverse: Float[Tensor, "*lead l m"]) -> Float[Tensor, "*lead l"]:
        score = {
            "pooled": lambda: 1 / inverse.nanmean(-1),
            "average": lambda: (1 / inverse).nanmean(-1),
            "median": lambda: median(1 / inverse),
        }[self.combine]()
        # Points at equal distances have no finite dimension.
        return score.masked_fill(score.isinf(), torch.nan)

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        found = [scores["score"][..., 0]]
        return [*found, scores["pointwise"][..., 0, :]] if self.return_pointwise else found
