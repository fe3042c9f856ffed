"""The k nearest rows of each row in several layers at once, tied and repeated rows included, block by block."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from tdprobe._types import Bool, Float, Int
from tdprobe.stats.distances import EXACT_BLOCK, TIE, Space
from tdprobe.stats.neighbors import NeighborTable
from tdprobe.stats.precision import at_once

# Most rows in a block, and numbers for the lists of one, between all layers.
BLOCK, BUDGET = 128, 2**23


@dataclass
class Neighborhoods:
    """Hold the k nearest rows of some rows in l layers.

    Rows equal to a row are its nearest. Tied rows share the places that are left for them: each is in by a share,
    and has the harmonic mean of these places for its rank, so that the order of rows never matters. Without ties
    all shares are 1 and the ranks 1 to k.

    Attributes:
        rows: Places of the rows, ``(r,)`` int64.
        other: The nearest rows, ``(l, r, s)`` int64; the number of all rows where the list is shorter.
        share: How much of each is in, ``(l, r, s)`` float64; each list sums to k.
        rank: 1 for the nearest, ``(l, r, s)`` float64.
        total: Number of all rows.
    """

    rows: Tensor
    other: Tensor
    share: Tensor
    rank: Tensor
    total: int

    @cached_property
    def _flat(self) -> Int[Tensor, "r t"]:
        return self.other.movedim(0, 1).flatten(1)

    def looked_up(self, layer: int, values: Float[Tensor, "r s"]) -> Float[Tensor, "l r s"]:
        """Return values of the nearest rows in one layer for those of all layers, 0 for rows that it does not have."""
        wide = values.new_zeros(len(values), self.total + 1).scatter_(1, self.other[layer], values)
        wide[:, -1] = 0
        return self.gathered(wide)

    def gathered(self, wide: Float[Tensor, "r n"]) -> Float[Tensor, "l r s"]:
        """Return values of all rows for the nearest rows in all layers; the last column is for lists that are short."""
        return wide.gather(1, self._flat).unflatten(1, (len(self.other), -1)).movedim(1, 0)

    def common(self, layer: int) -> Float[Tensor, "l r s"]:
        """Return by how much the nearest rows in each layer are among those of one layer too: the smaller share."""
        return torch.minimum(self.looked_up(layer, self.share[layer]), self.share)

    def overlap(self) -> Float[Tensor, "r l l"]:
        """Return how many nearest rows two layers have in common."""
        found = torch.stack([self.common(layer).sum(-1) for layer in range(len(self.other))]).movedim(-1, 0)
        # The same sum in another order.
        return (found + found.mT) / 2


Terms = Callable[[Neighborhoods, list[Tensor]], Tensor]


def mean_terms(table: NeighborTable, k: int, terms: Terms) -> tuple[Float[Tensor, "*lead l l"], Tensor]:
    """Average a comparison of the neighbourhoods of each row over all rows.

    Args:
        table: With ranks up to k + 1 and k places.
        k: Neighbours.
        terms: Given the neighbourhoods of some rows, and the rows ``(n, d)`` of each layer: ``(r, l, l)`` float64.

    Returns:
        The mean and its standard error, NaN for layers that are not finite.
    """
    lead, layers, n = table.finite.shape[:-1], table.finite.shape[-1], len(table.ids)
    out = torch.full((2, *lead, layers, layers), torch.nan, dtype=torch.float64, device=table.ids.device)
    for index in product(*map(range, lead)):
        (held,) = table.finite[index].nonzero().unbind(1)
        if len(held) == 0:
            continue
        data = [table.rows[str(layer)][index] for layer in held.tolist()]
        found = torch.cat([terms(hoods, data) for hoods in _blocks(table, index, held, k)])
        mean, se = found.mean(0), found.std(0) / n**0.5
        out[(slice(None), *index)][:, held.unsqueeze(1), held] = torch.stack([mean, se])
    return out[0], out[1]


def _blocks(table: NeighborTable, index: tuple[int, ...], held: Tensor, k: int) -> Generator[Neighborhoods]:
    layers = [_Layer(table, (*index, layer), k) for layer in held.tolist()]
    n, longest = len(table.ids), max(layer.longest for layer in layers)
    block, budget = (at_once(number, table.first.device) for number in (BLOCK, BUDGET))
    size = max(4, min(block, budget // (len(layers) ** 2 * longest)))
    for rows in torch.arange(n, device=table.ids.device).split(size):
        yield _stacked(rows, [layer.lists(rows) for layer in layers], n)


def _stacked(rows: Tensor, lists: list[tuple[Tensor, Tensor, Tensor]], n: int) -> Neighborhoods:
    longest = max(other.shape[1] for other, _, _ in lists)
    fills = (n, 0.0, 1.0)
    padded = [
        torch.stack([torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=fill) for x in column])
        for column, fill in zip(zip(*lists, strict=True), fills, strict=True)
    ]
    return Neighborhoods(rows, *padded, n)


class _Layer:
    """List the nearest rows in one layer of one data set."""

    def __init__(self, table: NeighborTable, index: tuple[int, ...], k: int) -> None:
        # Everything there is, where there are fewer other rows than places.
        self.k, self.rows = k, table.rows[str(index[-1])][index[:-1]]
        self.first, self.places = table.first[index], table.places[index][:, :k]
        ranks = torch.searchsorted(table.ranks, torch.arange(1, k + 2, device="cpu"))
        distances = table.distances[index][:, ranks]
        self.tied = (distances[:, 1:] <= distances[:, :-1] * (1 + TIE)) & (distances[:, 1:] < torch.inf)
        self.copies = torch.bincount(self.first, minlength=len(self.first))
        repeated = (self.copies[self.first] > 1) | (self.copies[self.places] > 1).any(1)
        self.odd: Bool[Tensor, "n"] = repeated | self.tied.any(1) | (self.places[:, -1] < 0)

    @property
    def longest(self) -> int:
        """Bound how many rows are listed for any row."""
        if bool(self.tied[:, -1].any()):
            return len(self.first)
        return int((self.copies[self.first] + self.copies[self.places].sum(1)).max())

    @cached_property
    def _by_first(self) -> Tensor:
        # Rows that are equal stand together.
        return self.first.sort(stable=True).indices

    @cached_property
    def _starts(self) -> Tensor:
        return self.copies.cumsum(0) - self.copies

    @cached_property
    def _space(self) -> Space:
        return Space(self.rows)

    @cached_property
    def _harmonic(self) -> Tensor:
        numbers = torch.arange(1, self.k + 1, dtype=torch.float64, device=self.first.device)
        return torch.cat([numbers.new_zeros(1), (1 / numbers).cumsum(0)])

    def lists(self, rows: Int[Tensor, "r"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest rows of some rows, their shares and ranks, ``(r, s)`` each."""
        other = self.places[rows]
        share = torch.ones(other.shape, dtype=torch.float64, device=other.device)
        rank = torch.arange(1, self.k + 1, device=other.device).double().expand_as(share)
        (odd,) = self.odd[rows].nonzero().unbind(1)
        if len(odd) == 0:
            return other, share, rank
        found = self._shared(rows[odd])
        width = found[0].shape[1] - self.k
        n = len(self.first)
        plain = (other, share, rank.clone())
        wide = [
            torch.nn.functional.pad(x, (0, max(0, width)), value=v) for x, v in zip(plain, (n, 0.0, 1.0), strict=True)
        ]
        for x, special, fill in zip(wide, found, (n, 0.0, 1.0), strict=True):
            x[odd] = torch.nn.functional.pad(special, (0, max(0, -width)), value=fill).to(x.dtype)
        return wide[0], wide[1], wide[2]

    def _shared(self, rows: Int[Tensor, "t"]) -> tuple[Tensor, Tensor, Tensor]:
        """List rows that are tied, or equal to others, with their shares."""
        row, group, other = self._grouped(rows)
        groups = self.k + 1
        size = torch.bincount(row * groups + group, minlength=len(rows) * groups).view(-1, groups)
        start = size.cumsum(1) - size
        taken = torch.minimum((self.k - start).clamp(min=0), size)
        share = taken.double() / size.clamp(min=1)
        start = start.clamp(max=self.k)
        rank = taken.double() / (self._harmonic[start + taken] - self._harmonic[start]).clamp(min=TIE)
        kept = share[row, group] > 0
        row, group, other = row[kept], group[kept], other[kept]
        within = torch.arange(len(row), device=row.device)
        within = within - torch.searchsorted(row, row)
        shape = (len(rows), max(self.k, int(within.max()) + 1))
        out = (
            torch.full(shape, len(self.first), device=row.device),
            torch.zeros(shape, dtype=torch.float64, device=row.device),
            torch.ones(shape, dtype=torch.float64, device=row.device),
        )
        for x, value in zip(out, (other, share[row, group], rank[row, group]), strict=True):
            x[row, within] = value
        return out

    def _grouped(self, rows: Int[Tensor, "t"]) -> tuple[Tensor, Tensor, Tensor]:
        """List own copies and nearest rows with the number of their group; those of one group are equally far."""
        places = self.places[rows]
        # Group 0 are a row's own copies; a nearest row begins a group where it is farther than the one before.
        begins = ~torch.cat([torch.zeros_like(self.tied[rows, :1]), self.tied[rows, : self.k - 1]], 1)
        group = begins.cumsum(1)
        # The last group may go on beyond the list.
        (open_,) = self.tied[rows, -1].nonzero().unbind(1)
        listed = (places >= 0) & ~(self.tied[rows, -1:] & (group == group[:, -1:]))
        row = listed.nonzero()[:, 0]
        tied_row, tied = self._all_tied(rows[open_])
        every = torch.arange(len(rows), device=rows.device)
        row = torch.cat([every, row, open_[tied_row]])
        number = torch.cat([torch.zeros_like(every), group[listed], group[open_[tied_row], -1]])
        first = torch.cat([self.first[rows], places[listed], tied])
        counts = self.copies[first]
        within = torch.arange(int(counts.sum()), device=rows.device)
        within = within - (counts.cumsum(0) - counts).repeat_interleave(counts)
        other = self._by_first[self._starts[first].repeat_interleave(counts) + within]
        row, number = row.repeat_interleave(counts), number.repeat_interleave(counts)
        kept = other != rows[row]
        row, number, other = row[kept], number[kept], other[kept]
        order = (row * (self.k + 1) + number).argsort(stable=True)
        return row[order], number[order], other[order]

    def _all_tied(self, rows: Int[Tensor, "t"]) -> tuple[Tensor, Tensor]:
        """Find all distinct rows that are as far as the last one listed."""
        found = [torch.zeros(2, 0, dtype=torch.int64, device=rows.device)]
        size = max(1, at_once(EXACT_BLOCK, rows.device) // len(self.first))
        for start in range(0, len(rows), size):
            space, part = self._space, rows[start : start + size]
            target = space.exact(part, space.own[self.places[part, -1]])
            gap = (space.block(part).double() + (space.offset(part, space.dtype) - target).unsqueeze(1)).abs()
            row, point = (gap <= space.slack(part, target, space.dtype).unsqueeze(1)).nonzero().unbind(1)
            tied = (space.exact(part[row], point) - target[row]).abs() <= 2 * TIE * target[row]
            found.append(torch.stack([row[tied] + start, space.first[point[tied]]]))
        row, first = torch.cat(found, 1)
        return row, first
