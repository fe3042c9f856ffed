"""The nearest rows of rows, all that are tied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tdprobe._types import Bool, Int
from tdprobe.stats.distances import Space
from tdprobe.stats.nearest import Nearest

# Rows to rank, times points, for each column, from which on the doubts that float32 leaves cost more than float64.
DOUBTFUL = 128


@dataclass
class Partners:
    """List the nearest rows of some rows, all that are tied.

    Attributes:
        row: With ``other``: which of the rows has which nearest row, ``(t,)`` int64, ascending.
        other: Places of the nearest rows.
        counts: How many each row has, ``(r,)`` int64, at least 1.
    """

    row: Tensor
    other: Tensor
    counts: Tensor

    @cached_property
    def first(self) -> Tensor:
        """The first one of each row, ``(r,)``."""
        return self.other[self.counts.cumsum(0) - self.counts]

    def of(self, rows: Bool[Tensor, "r"]) -> tuple[Tensor, Tensor]:
        """Return ``row`` and ``other`` for some rows only."""
        chosen = rows[self.row]
        return self.row[chosen], self.other[chosen]


def partners_of(space: Space, rows: Int[Tensor, "r"], nearest: Nearest) -> Partners:
    """Turn the nearest points of rows into rows: a row's own copies where there are any, else those of the points."""
    own, places = space.own[rows], torch.arange(len(rows), device=rows.device)
    alone = space.repeats[own] == 1
    kept, copied = alone[nearest.row], places[~alone]
    row = torch.cat([nearest.row[kept], copied])
    point = torch.cat([nearest.point[kept], own[copied]])
    row, order = row.sort(stable=True)
    point = point[order]
    counts = space.repeats[point]
    starts = (space.repeats.cumsum(0) - space.repeats)[point]
    within = torch.arange(int(counts.sum()), device=rows.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    row, other = row.repeat_interleave(counts), space.by_point[starts.repeat_interleave(counts) + within]
    itself = other == rows[row]
    row, other = row[~itself], other[~itself]
    return Partners(row, other, torch.bincount(row, minlength=len(rows)))


def settle_products(spaces: Iterable[Space], partners: Sequence[Partners]) -> None:
    """Take products in float64 from now on where layers share so little that many rows are ranked in each.

    Args:
        spaces: The layers.
        partners: The nearest of some rows in each of them.
    """
    nearest = torch.stack([found.first for found in partners], 1).sort(1).values
    ranked = float(nearest.diff(dim=1).count_nonzero()) / len(nearest)
    for space in spaces:
        if space.p == 2 and space.rows.device.type == "cpu" and ranked * space.points > DOUBTFUL * space.rows.shape[1]:
            space.dtype = torch.float64
