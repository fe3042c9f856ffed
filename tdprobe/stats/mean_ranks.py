"""How far the nearest rows of one layer are in another: by counting, or by one sort for many other layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product as pairs_of

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.stats.distances import EXACT_BLOCK, EXACT_COST, TIE, Space
from tdprobe.stats.nearest import Nearest
from tdprobe.stats.order import in_order, parted
from tdprobe.stats.seen import Seen

# Targets of a row from which on sorting its points once costs less than comparing them with each.
SORTED = 6
# Numbers that are compared at once: what is found to be in doubt may be all of them.
COMPARED = 2**21


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


def mean_ranks(seen: Seen, partners: Sequence[Partners]) -> Float[Tensor, "r l"]:
    """Return the mean rank, in this layer, of the nearest rows of l other layers.

    The rank of row j for row i is the number of rows nearer to i than j, plus half of the number of rows at the
    distance of j, itself included, plus one half: 1 for the nearest, n - 1 for the farthest, and the mean of the
    tied places where rows are tied.

    Args:
        seen: Measures of some rows in the layer.
        partners: The nearest of these rows in each of the other layers.
    """
    n, counts = len(seen.space.rows), torch.stack([found.counts for found in partners], 1)
    # Where all other rows are tied, their mean rank is the same in every layer.
    ranks = torch.full(counts.shape, n / 2, dtype=torch.float64, device=counts.device)
    single = (counts == 1) & (counts < n - 1)
    if bool(single.any()):
        other = torch.stack([found.first for found in partners], 1)
        ranks = torch.where(single, _ranks_of_one(seen, other), ranks)
    several = (counts > 1) & (counts < n - 1)
    for column in several.any(0).nonzero().flatten().tolist():
        (some,) = several[:, column].nonzero().unbind(1)
        most = max(seen.space.points, int(counts[some, column].max()))
        for part in some.split(max(1, EXACT_BLOCK // most)):
            ranks[part, column] = _ranks_of_several(seen, partners[column], part)
    return ranks


def _ranks_of_one(seen: Seen, other: Int[Tensor, "r l"]) -> Float[Tensor, "r l"]:
    """Rank one row of each of l layers: count what is surely nearer, and measure what may be."""
    space, own = seen.space, seen.space.own[seen.rows].unsqueeze(1)
    point = space.own[other]
    copy = point == own
    # The block says how far a row is up to its slack, and of the points around it the same.
    measure = seen.block.gather(1, point).double().masked_fill(copy, 0)
    slack = 2 * seen.slack(seen.ceiling(measure + seen.offset.unsqueeze(1), point))
    # A row's own copies are at distance 0, and its point was left out of the block.
    bounds = ((measure + sign * slack).to(seen.block.dtype).masked_fill(copy, -torch.inf) for sign in (-1, 1))
    ranked = _by_sorting if other.shape[1] >= SORTED else _by_counting
    nearer, tied = ranked(seen, _Targets(point, *bounds))
    copies = (space.repeats[own] - 1).double()
    return torch.where(copy, (copies + 1) / 2, copies + nearer + (tied + 1) / 2)


@dataclass
class _Targets:
    """Points to rank, ``(r, l)``, and between which measures of the block there may be others as near as they are."""

    point: Tensor
    low: Tensor
    high: Tensor


def _by_counting(seen: Seen, targets: _Targets) -> tuple[Tensor, Tensor]:
    """Compare every point with every bound, what few targets take: count what is nearer than each, and as near."""
    space = seen.space
    nearer, tied = torch.zeros_like(targets.low, dtype=torch.float64), space.repeats[targets.point].double()
    more, count = (space.repeats[space.several] - 1).double(), targets.point.shape[1]
    size = max(1, COMPARED // space.points)
    for start, column in pairs_of(range(0, len(seen.rows), size), range(count)):
        part = slice(start, start + size)
        found = parted(seen.block[part], targets.low[part, column], targets.high[part, column])
        nearer[part, column] = found.below + found.mask[:, space.several].double() @ more
        _decide(seen, targets, ((start + found.row) * count + column, found.place), (nearer, tied))
    return nearer, tied


def _by_sorting(seen: Seen, targets: _Targets) -> tuple[Tensor, Tensor]:
    """Sort the points of each row once for all targets, what many take; otherwise as `_by_counting`."""
    space, low, high = seen.space, targets.low.contiguous(), targets.high.contiguous()
    ordered = in_order(seen.block)
    nearer = torch.searchsorted(ordered, low).double()
    perhaps = torch.searchsorted(ordered, high, right=True).double()
    several = space.several
    if len(several):
        # Copies count for themselves. Few points have any, and sorting with places and weights takes its time.
        ordered, order = seen.block[:, several].sort(1)
        more = torch.nn.functional.pad((space.repeats[several] - 1).double()[order].cumsum(1), (1, 0))
        nearer += more.gather(1, torch.searchsorted(ordered, low))
        perhaps += more.gather(1, torch.searchsorted(ordered, high, right=True))
    tied = space.repeats[targets.point].double()
    # The target itself is in doubt always; with any other point beside it the two are measured.
    (which,) = (perhaps - nearer > tied).flatten().nonzero().unbind(1)
    for part in which.split(max(1, COMPARED // space.points)):
        found = parted(seen.block[part // low.shape[1]], low.flatten()[part], high.flatten()[part])
        _decide(seen, targets, (part[found.row], found.place), (nearer, tied))
    return nearer, tied


def _decide(seen: Seen, targets: _Targets, doubt: tuple[Tensor, Tensor], sums: tuple[Tensor, Tensor]) -> None:
    """Measure the points in doubt, and add those that are nearer than their target, and those tied with it, to sums."""
    space, point, count = seen.space, targets.point.flatten(), targets.point.shape[1]
    which, near = doubt
    nearer, tied = (total.view(-1) for total in sums)
    other = near != point[which]
    which, near = which[other], near[other]
    if seen.block.dtype == torch.float32 and len(which) * EXACT_COST > seen.block.numel():
        which, near = _narrowed(seen, targets, (which, near), nearer)
    measured, inverse = which.unique(return_inverse=True)
    goal = space.exact(seen.rows[measured // count], point[measured])[inverse]
    measure, amount = space.exact(seen.rows[which // count], near), space.repeats[near].double()
    nearer.index_add_(0, which, amount * (measure < goal * (1 - TIE)))
    tied.index_add_(0, which, amount * ((measure - goal).abs() <= goal * TIE))


def _narrowed(seen: Seen, targets: _Targets, doubt: tuple[Tensor, Tensor], nearer: Tensor) -> tuple[Tensor, Tensor]:
    """Add what float64 products show to be nearer, and return what they leave in doubt: cheaper than measuring all."""
    space, point, count = seen.space, targets.point.flatten(), targets.point.shape[1]
    which, near = doubt
    measured, inverse = which.unique(return_inverse=True)
    row, place = (measured // count).unique(return_inverse=True)
    block = space.block(seen.rows[row], torch.float64)
    rows, goal = seen.rows[measured // count], block[place, point[measured]]
    reach = space.ceiling(rows, goal.unsqueeze(1), point[measured].unsqueeze(1), block.dtype)
    slack = 2 * space.slack(rows, reach.squeeze(1), block.dtype)[inverse]
    gap = block[place[inverse], near] - goal[inverse]
    nearer.index_add_(0, which, space.repeats[near].double() * (gap < -slack))
    kept = gap.abs() <= slack
    return which[kept], near[kept]


def _ranks_of_several(seen: Seen, partners: Partners, some: Tensor) -> Tensor:
    """Rank all partners of some rows at once: each point counts for the partners that it is nearer than."""
    seen, targets = seen.some(some), _padded_targets(seen, partners, some)
    space, rows, block = seen.space, seen.rows, seen.block
    counts = partners.counts[some].unsqueeze(1)
    farthest = targets.gather(1, counts - 1).squeeze(1)
    slack, lacking = seen.slack(farthest).unsqueeze(1), targets - seen.offset.unsqueeze(1)
    low, high = ((lacking + sign * slack).to(block.dtype) for sign in (-1, 1))
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


def _padded_targets(seen: Seen, partners: Partners, some: Tensor) -> Tensor:
    """Return the measures of the partners of some rows, ascending, padded with infinity."""
    places = torch.full_like(partners.counts, -1)
    places[some] = torch.arange(len(some), device=some.device)
    taken = places[partners.row] >= 0
    row, other = partners.row[taken], partners.other[taken]
    within = torch.arange(len(row), device=row.device)
    within -= torch.searchsorted(row, row)
    out = torch.full((len(some), int(within.max()) + 1), torch.inf, dtype=torch.float64, device=row.device)
    out[places[row], within] = seen.space.exact(seen.rows[row], seen.space.own[other])
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
