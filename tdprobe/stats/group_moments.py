"""Moments of every layer, and the sum of the rows of each group: scatter between and within groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.stats.moments import Moments, MomentsState
from tdprobe.stats.state import State, Statistic, by_layer, layer_list, undisturbed


class GroupMomentsState(State):
    """Hold moments of all rows, and count and sum of the rows of each group.

    Attributes:
        moments: Mean and scatter of each layer.
        groups: Numbers of the g groups seen, ascending, ``(g,)`` float64.
        counts: Rows of each group, ``(g,)`` int64.
        sums: Layer index (``"0"``, ``"1"``, ...) -> sum of the rows of each group, ``(*lead, g, d)`` float64.
        limit: Most groups to keep, int64.
    """

    moments: MomentsState
    groups: Tensor
    counts: Tensor
    sums: TensorDict
    limit: Tensor

    @property
    def n(self) -> Tensor:
        """Count the rows, int64."""
        return self.moments.n

    def merge(self, other: GroupMomentsState) -> GroupMomentsState:
        """Join two streams: moments merge, and the sums of a group add.

        Raises:
            ConfigError: More groups than the limit.
        """
        both = zip(layer_list(self.sums), layer_list(other.sums), strict=True)
        found = _collected(
            torch.cat([self.groups, other.groups]),
            torch.cat([self.counts, other.counts]),
            [torch.cat(pair, -2) for pair in both],
            int(self.limit),
        )
        return GroupMomentsState(self.moments.merge(other.moments), *found, self.limit)


def _collected(groups: Tensor, counts: Tensor, rows: Sequence[Tensor], limit: int) -> tuple[Tensor, Tensor, TensorDict]:
    """Add up what belongs to one group."""
    groups, place = groups.unique(return_inverse=True)
    if len(groups) > limit:
        raise ConfigError(
            f"rows of more than {limit} groups came, and a sum is kept for each; give rows that belong together the "
            "same number, use fewer groups, or raise the limit of GroupMoments"
        )
    total = torch.zeros_like(counts[: len(groups)]).index_add_(0, place, counts)
    sums = [x.new_zeros(*x.shape[:-2], len(groups), x.shape[-1], dtype=torch.float64) for x in rows]
    added = (out.index_add_(-2, place.to(x.device), x.double()) for out, x in zip(sums, rows, strict=True))
    return groups, total, by_layer(added)


@dataclass(frozen=True)
class GroupMoments(Statistic):
    """Keep the moments of every layer and the sum of every group of rows.

    The last of ``rows`` holds the number of the group of each row, ``(*lead, n, 1)``: rows of one group may come in any
    order and in any batches. The state grows with the groups, d numbers for each of them and each layer.

    Args:
        limit: Most groups to keep; more are an error.

    Example:
        >>> x, groups = torch.tensor([[1.0], [7.0], [3.0], [9.0]]), torch.tensor([[5.0], [2.0], [5.0], [2.0]])
        >>> statistic, ids = GroupMoments(), torch.arange(4)
        >>> state = statistic.update(statistic.init([x, groups], ids), [x, groups], ids)
        >>> state.groups.tolist(), (state.sums["0"].squeeze(1) / state.counts).tolist()
        ([2.0, 5.0], [8.0, 2.0])
    """

    name: ClassVar[str] = "group_moments"
    limit: int = 8192

    @property
    def route(self) -> str:
        """Say what is kept."""
        return "covariance within and between groups"

    def nbytes(self, widths: Sequence[int], data_sets: int = 1) -> int:
        """Return the size of a state without its groups in bytes."""
        return Moments().nbytes(widths[:-1], data_sets)

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> GroupMomentsState:
        """Return empty moments for the layers of ``rows``."""
        (*layers, _), device = rows, rows[0].device
        return GroupMomentsState(
            moments=Moments().init(layers, ids),
            groups=torch.zeros(0, dtype=torch.float64, device=device),
            counts=torch.zeros(0, dtype=torch.int64, device=device),
            sums=by_layer(x.detach()[..., :0, :].double() for x in layers),
            limit=torch.tensor(self.limit, device=device),
        )

    @undisturbed
    def update(self, state: GroupMomentsState, rows: Sequence[Tensor], ids: Tensor) -> GroupMomentsState:
        """Merge the moments and sums of ``rows`` into the state.

        Raises:
            ConfigError: More groups than the limit, or groups that differ between data sets.
        """
        *layers, numbers = rows
        if rows[0].shape[-2] == 0 or numbers.numel() == 0:
            return state
        sets = numbers[..., 0].reshape(-1, numbers.shape[-2]).double()
        if not bool((sets == sets[:1]).all()):
            raise ConfigError("rows are grouped differently in different data sets, or by NaN; score them one by one")
        groups = sets[0].to(layers[0].device)
        moments = Moments().update(self.init(rows, ids).moments, layers, ids)
        counts = torch.ones_like(groups, dtype=torch.int64)
        found = _collected(groups, counts, [x.detach() for x in layers], self.limit)
        return state.merge(GroupMomentsState(moments, *found, state.limit))


def within_and_between(
    state: GroupMomentsState, layer: str
) -> tuple[Float[Tensor, "*lead d d"], Float[Tensor, "*lead d d"]]:
    """Split the covariance of a layer into that within and that between the groups of two rows or more.

    Returns:
        ``1/n sum (x - m_g)(x - m_g)'`` and ``1/n sum n_g (m_g - m)(m_g - m)'``, with n the rows of those groups,
        ``m_g`` their means and m the mean of all; float64.
    """
    counts, sums, mu = state.counts.double().unsqueeze(-1), state.sums[layer], state.moments.mu[layer]
    # The scatter within groups is what that between them leaves of the whole; single rows have none.
    gaps = sums / counts - mu.unsqueeze(-2)
    within = state.moments.scatters[layer] - (counts * gaps).mT @ gaps
    several = state.counts > 1
    counts, gaps = counts[several], gaps[..., several, :]
    n = counts.sum()
    gaps = gaps - (counts * gaps).sum(-2, keepdim=True) / n
    return within / n, (counts * gaps).mT @ gaps / n
