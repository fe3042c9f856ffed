"""How far the nearest rows of one layer are in another: ranks by counting, never by sorting a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.stats.distances import EXACT_BLOCK, TIE, TILE, Space
from tdprobe.stats.nearest import Nearest

# Columns in which doubts are looked for together; a tile holds whole ones.
CHUNK = 256


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


def mean_ranks(
    space: Space, rows: Int[Tensor, "r"], block: Tensor, partners: Sequence[Partners]
) -> Float[Tensor, "r l"]:
    """Return the mean rank, in this layer, of the nearest rows of l other layers.

    The rank of row j for row i is the number of rows nearer to i than j, plus half of the number of rows at the
    distance of j, itself included, plus one half: 1 for the nearest, n - 1 for the farthest, and the mean of the
    tied places where rows are tied.

    Args:
        space: The layer.
        rows: Places of the rows.
        block: ``space.block(rows)``.
        partners: The nearest rows in each of the other layers.
    """
    n, counts = len(space.rows), torch.stack([found.counts for found in partners], 1)
    # Where all other rows are tied, their mean rank is the same in every layer.
    ranks = torch.full(counts.shape, n / 2, dtype=torch.float64, device=rows.device)
    single = (counts == 1) & (counts < n - 1)
    if bool(single.any()):
        other = torch.stack([found.other[found.counts.cumsum(0) - found.counts] for found in partners], 1)
        ranks = torch.where(single, _ranks_of_one(space, rows, block, other), ranks)
    for column, found in enumerate(partners):
        (some,) = ((found.counts > 1) & (found.counts < n - 1)).nonzero().unbind(1)
        if len(some):
            most = max(space.points, int(found.counts[some].max()))
            for part in some.split(max(1, EXACT_BLOCK // most)):
                ranks[part, column] = _ranks_of_several(space, rows, block, found, part)
    return ranks


def _ranks_of_one(space: Space, rows: Tensor, block: Tensor, other: Int[Tensor, "r l"]) -> Float[Tensor, "r l"]:
    """Rank one row of each of l layers: count what is surely nearer and what may be, and decide the doubts."""
    point = space.own[other]
    target = space.exact(rows.unsqueeze(1).expand_as(other).flatten(), point.flatten()).view_as(point)
    slack = space.slack(rows, target, space.dtype)
    seen = target - space.offset(rows).unsqueeze(1)
    low, high = ((seen + sign * slack).to(block.dtype) for sign in (-1, 1))
    below, upto = _counts(block, low, high, space.repeats.to(block.dtype))
    nearer, tied = below.sum(2).double(), space.repeats[point].double()
    some = (upto.sum(2) - nearer != tied) & (target > 0)
    # Only the chunks in which there is something in doubt are looked at again.
    doubts = ((upto > below) & some.unsqueeze(2)).nonzero()
    tied[some], width = 0, min(CHUNK, space.points)
    windows = block.unfold(1, width, 1)
    for part in doubts.split(max(1, EXACT_BLOCK // CHUNK)):
        row, column, chunk = part.unbind(1)
        # The last chunk is shorter: it is looked at with the end of the one before.
        begin = (chunk * CHUNK).clamp(max=space.points - width)
        places = begin.unsqueeze(1) + torch.arange(width, device=rows.device)
        values = windows[row, begin]
        inside = (values >= low[row, column].unsqueeze(1)) & (values <= high[row, column].unsqueeze(1))
        member, offset = (inside & (places >= chunk.unsqueeze(1) * CHUNK)).nonzero().unbind(1)
        row, column = row[member], column[member]
        more, equal = _decided(space, rows[row], places[member, offset], target[row, column])
        nearer.index_put_((row, column), more, accumulate=True)
        tied.index_put_((row, column), equal, accumulate=True)
    # A row's own copies are at distance 0, and its point was left out of the block.
    copies = (space.repeats[space.own[rows]] - 1).double().unsqueeze(1)
    return torch.where(target > 0, copies + nearer + (tied + 1) / 2, (copies + 1) / 2)


def _counts(block: Tensor, low: Tensor, high: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Count the rows below one bound and up to the other, for each column of bounds and chunk: ``(r, l, chunks)``."""
    points, chunks = block.shape[1], -(-block.shape[1] // CHUNK)
    below, upto = (block.new_zeros(*low.shape, chunks) for _ in range(2))
    several, ones = bool((weights > 1).any()), weights.new_ones(CHUNK)
    for start in range(0, points, TILE):
        tile, part = block[:, start : start + TILE], weights[start : start + TILE]
        place = slice(start // CHUNK, -(-(start + tile.shape[1]) // CHUNK))
        flags = tile.new_zeros(len(tile), (place.stop - place.start) * CHUNK)
        mark, by_chunk = flags[:, : tile.shape[1]], flags.unflatten(1, (-1, CHUNK))
        sides = ((torch.lt, low, below), (torch.le, high, upto))
        for column, (compare, bound, found) in product(range(low.shape[1]), sides):
            compare(tile, bound[:, column : column + 1], out=mark)
            if several:
                mark.mul_(part)
            found[:, column, place] = by_chunk @ ones
    return below, upto


def _decided(space: Space, rows: Tensor, points: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh, by exact measures, the points that are nearer than a target, and those tied with it."""
    measure, amount = space.exact(rows, points), space.repeats[points].double()
    return amount * (measure < target * (1 - TIE)), amount * ((measure - target).abs() <= target * TIE)


def _ranks_of_several(space: Space, rows: Tensor, block: Tensor, partners: Partners, some: Tensor) -> Tensor:
    """Rank all partners of some rows at once: each point counts for the partners that it is nearer than."""
    targets = _padded_targets(space, rows, partners, some)
    counts = partners.counts[some].unsqueeze(1)
    rows, block = rows[some], block[some]
    farthest = targets.gather(1, counts - 1).squeeze(1)
    slack = space.slack(rows, farthest, space.dtype).unsqueeze(1)
    seen = targets - space.offset(rows).unsqueeze(1)
    low, high = ((seen + sign * slack).to(block.dtype) for sign in (-1, 1))
    sure, perhaps = _farther(low, block, counts), _as_far(high, block, counts)
    nearer_than = (sure + perhaps).double() / 2
    row, column = (sure != perhaps).nonzero().unbind(1)
    if len(row):
        exact = torch.full_like(block, torch.inf, dtype=torch.float64)
        exact[row, column] = space.exact(rows[row], column)
        nearer_than[row, column] = _beyond(targets, exact, counts)[row, column]
    copies = (space.repeats[space.own[rows]] - 1).double().unsqueeze(1)
    own = copies * _beyond(targets, torch.zeros_like(copies), counts)
    total = nearer_than @ space.repeats.double().unsqueeze(1) + own
    return (total / counts + 0.5).squeeze(1)


def _padded_targets(space: Space, rows: Tensor, partners: Partners, some: Tensor) -> Tensor:
    """Return the measures of the partners of some rows, ascending, padded with infinity."""
    places = torch.full_like(partners.counts, -1)
    places[some] = torch.arange(len(some), device=some.device)
    taken = places[partners.row] >= 0
    row, other = partners.row[taken], partners.other[taken]
    within = torch.arange(len(row), device=row.device)
    within -= torch.searchsorted(row, row)
    out = torch.full((len(some), int(within.max()) + 1), torch.inf, dtype=torch.float64, device=row.device)
    out[places[row], within] = space.exact(rows[row], space.own[other])
    return out.sort(1).values


def _beyond(targets: Tensor, measure: Tensor, counts: Tensor) -> Tensor:
    """Count the targets beyond each measure, those tied with it by half."""
    farther = _farther(targets * (1 - TIE), measure, counts)
    return (farther + _as_far(targets * (1 + TIE), measure, counts)).double() / 2


def _farther(targets: Tensor, measure: Tensor, counts: Tensor) -> Tensor:
    # An infinite measure is not nearer than the padding.
    return (counts - torch.searchsorted(targets, measure, right=True)).clamp(min=0)


def _as_far(targets: Tensor, measure: Tensor, counts: Tensor) -> Tensor:
    return counts - torch.searchsorted(targets, measure)
