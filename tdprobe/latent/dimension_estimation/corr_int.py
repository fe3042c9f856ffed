"""Correlation dimension: how the number of close pairs grows with the distance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.latent.dimension_estimation.neighbor_dimension import NeighborDimension, counted, median
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.distances import TIE
from tdprobe.stats.neighbors import Neighbors, NeighborTable, as_neighbors
from tdprobe.stats.radius import count_within


@register(
    Spec(
        name="corr_int",
        kind="layer",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="2 n^2 d per layer, for a bank of n rows",
        reference="Grassberger, Procaccia 1983, Measuring the strangeness of strange attractors",
    )
)
class CorrelationDimensionEstimator(NeighborDimension):
    """Estimate the correlation dimension between two distances.

    With ``C(r)`` the share of pairs nearer than r: ``log(C(r_2) / C(r_1)) / log(r_2 / r_1)``, where ``r_1`` and ``r_2``
    are the medians of the distances to the k1-th and the k2-th neighbour.

    Rows that are equal count once. Pairs at exactly ``r`` are not nearer. NaN where the two distances are equal, or no
    pair is nearer than the smaller one.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k1: Rank that gives the smaller distance.
        k2: Rank that gives the larger distance.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``; they agree.

    Raises:
        ConfigError: A bad key or mode, or ranks that do not ascend from 1 on.

    Example:
        >>> square = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> td = CorrelationDimensionEstimator()(TensorDict({"data": square}))
        >>> abs(float(td["dimension"]) - 2) < 0.2
        True

    References:
        Grassberger, Procaccia 1983, Measuring the strangeness of strange attractors.
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "dimension",
        k1: int = 10,
        k2: int = 20,
        *,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        super().__init__(in_key, [out_key], bank_size=bank_size, mode=mode)
        if not (isinstance(k1, int) and isinstance(k2, int) and 1 <= k1 < k2):
            raise ConfigError(f"got k1={k1!r} and k2={k2!r}; allowed are ranks with 1 <= k1 < k2, such as 10 and 20")
        self.k1, self.k2 = k1, k2

    def derivation(self, state: Any) -> Neighbors:
        """Ask for the first k2 neighbours: they count the pairs of all rows whose neighbours are far."""
        return Neighbors(tuple(range(1, self.k2 + 1)))

    def score(self, state: Any) -> TensorDict:
        """Estimate the dimension of each layer.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"`` and its standard error ``"se"``, ``(*lead, l)`` float64, by the delta method for the pairs of
            each row, the two distances taken as given; ``"radii"``, ``(*lead, l, 2)``; ``"duplicates"`` and
            ``"finite"``.

        Raises:
            ConfigError: Fewer than k2 + 1 rows.
        """
        self._require(state, self.k2 + 1, f"k2={self.k2}")
        table = as_neighbors(state, self.derivation(state))
        valid = counted(table, self.k2)
        out = torch.full((4, *valid.shape[:-1]), torch.nan, dtype=torch.float64, device=valid.device)
        for index in product(*map(range, valid.shape[:-1])):
            # All distinct rows, or, where there are too few of them, none.
            if bool(valid[index].any()):
                radii = torch.stack([median(table.at(rank)[index][valid[index]]) for rank in (self.k1, self.k2)])
                counts = self._counts(table, index, valid[index].nonzero().squeeze(1), radii)
                out[(slice(None), *index)] = torch.stack([*_slope(counts, radii), *radii])
        return self._scores(table, score=out[0], se=out[1], radii=out[2:].movedim(0, -1))

    def _counts(self, table: NeighborTable, index: tuple[int, ...], rows: Tensor, radii: Tensor) -> Tensor:
        """Count, for each row, the others within both distances; only where they are many it takes another look."""
        near = torch.stack([table.at(rank)[index][rows] for rank in range(1, self.k2 + 1)], 1)
        counts = (near.unsqueeze(2) < radii * (1 - TIE)).sum(1).double()
        (many,) = (near[:, -1] < radii[1] * (1 - TIE)).nonzero().unbind(1)
        counts[many] = count_within(table.rows[str(index[-1])][index[:-1]], rows[many], radii)
        return counts

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["score"][..., 0]]


def _slope(counts: Float[Tensor, "m 2"], radii: Float[Tensor, "2"]) -> tuple[Tensor, Tensor]:
    """Return the growth of the number of pairs, and its error: each pair belongs to two rows, hence the 2."""
    mean, width = counts.mean(0), (radii[1] / radii[0]).log()
    terms = 2 * (counts[:, 1] / mean[1] - counts[:, 0] / mean[0])
    known = (width > 0) & (mean[0] > 0)
    score = torch.where(known, (mean[1] / mean[0]).log() / width, torch.nan)
    return score, torch.where(known, terms.std() / len(counts) ** 0.5 / width, torch.nan)
