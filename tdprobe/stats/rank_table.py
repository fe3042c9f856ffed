"""Ranks of the distances between all pairs of rows, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdprobe._types import Float, Int

if TYPE_CHECKING:
    from tdprobe.stats.kernel_layer import Rows

# Bins of distances where not all are told apart, and cells of the grid that finds the bin.
BINS, CELLS = 2**14, 2**16
# Rows and columns of a tile.
TILE = 512
# What tied distances may differ by, in units of the last place of a squared distance near 1.
ROUNDING = 64


class RankTable:
    """Give each distance its rank among all pairs of rows, divided by the number of pairs, less one half.

    Distances fall into bins and rank by the mean place of the members of their bin. Edges of bins lie in gaps between
    the distances in `Rows.sample`, so that distances which are equal but for rounding share a bin. Up to 1,024 rows
    these are all distances, and those that differ by more than rounding errors lie in different bins: ranks are
    exact, tied ones the mean of their places. Beyond, there are 16,384 bins of about the same number of pairs: with p
    the largest share in a bin, about 1e-4, a correlation of ranks is off by 2 p at most, and by about ``p^2`` where
    what is lost within bins is unrelated.

    Args:
        rows: The layer.
    """

    def __init__(self, rows: Rows) -> None:
        sample, n = rows.sample(), len(rows.points)
        m = len(sample)
        edges = _edges(sample, max(1, m // BINS) if m < n * (n - 1) // 2 else 1)
        low, self.middle, high = (float(sample[m * quarter // 4]) if m else 0.0 for quarter in (1, 2, 3))
        self.width = (high - low) or (float(sample[-1] - sample[0]) if m else 0.0) or 1.0
        counts = torch.bincount(self._cells(edges), minlength=CELLS + 1)
        self.first = (counts.cumsum(0) - counts).int()
        self.steps = [2**k for k in reversed(range(int(counts.max()).bit_length()))]
        self.edges = torch.cat([edges, edges.new_full((2 * max([1, *self.steps]),), torch.inf)])
        self.table = self._shares(rows, len(edges) + 1).to(rows.points.dtype)

    def ranks(self, square: Tensor, out: Tensor) -> Tensor:
        """Write the rank of each squared distance."""
        return out.copy_(self.table.index_select(0, self._bins(square)).view(square.shape))

    def _cells(self, square: Tensor) -> Int[Tensor, " *m"]:
        """Place distances on a grid that is fine where they are many, and has room for all."""
        z = (square - self.middle).div_(self.width)
        return z.div_(z.abs().add_(1)).add_(1).mul_(CELLS / 2).int()

    def _bins(self, square: Tensor) -> Int[Tensor, " m"]:
        """Count the edges below each distance: those of lower cells, and by bisection those of its own."""
        square = square.flatten()
        place = self.first.index_select(0, self._cells(square))
        for step in self.steps:
            place += (self.edges.index_select(0, place + (step - 1)) <= square).int().mul_(step)
        return place

    def _shares(self, rows: Rows, bins: int) -> Float[Tensor, " b"]:
        """Count the pairs in each bin and return the mean place of its members, as a share, less one half."""
        n, counts = len(rows.points), torch.zeros(bins, dtype=torch.int64, device=rows.points.device)
        for start in range(0, n, TILE):
            left = slice(start, min(start + TILE, n))
            for column in range(start, n, TILE):
                square = rows.between(left, slice(column, min(column + TILE, n)))[1]
                if column == start:
                    square = square[torch.ones_like(square, dtype=torch.bool).triu_(1)]
                counts += torch.bincount(self._bins(square), minlength=bins)
        return (counts.cumsum(0) - counts.double() / 2) / counts.sum().clamp(min=1) - 0.5


def _edges(sample: Float[Tensor, " m"], step: int) -> Float[Tensor, " e"]:
    """Return edges between ascending numbers, one for at least ``step`` of them, each in the widest gap around.

    Numbers that are tied but for rounding stay together: they span less than a window must to have an edge, so one
    that spans more holds a wider gap than any between them.
    """
    span = ROUNDING * torch.finfo(sample.dtype).eps
    slots = (sample / (2 * span)).floor()
    (changes,) = (slots[1:] != slots[:-1]).nonzero().unbind(1)
    wanted = torch.searchsorted(changes, torch.arange(0, len(sample), step, device=sample.device))
    ends = changes[wanted[wanted < len(changes)]].unique()
    # A window takes in the gap at its end.
    gaps, limits = sample.diff(), torch.cat([sample[:1], sample[ends + 1], sample[-1:]])
    places = torch.arange(len(gaps), device=sample.device)
    window = torch.searchsorted(ends, places)
    widest = gaps.new_zeros(len(ends) + 1).scatter_reduce_(0, window, gaps, "amax")
    first = torch.full_like(widest, len(gaps), dtype=torch.int64)
    at = (gaps == widest[window]) & (gaps > 0)
    first.scatter_reduce_(0, window[at], places[at], "amin")
    first = first[(first < len(gaps)) & (limits.diff()[: len(first)] > span)]
    return (sample[first] + sample[first + 1]) / 2
