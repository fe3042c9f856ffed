"""The ranks of single rows: among the nearest, whose order is known, by counting, or by one sort for many of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tdprobe._types import Bool, Float, Int
from tdprobe.stats.distances import TIE
from tdprobe.stats.order import parted, sort_in_place, sorting_pays_from
from tdprobe.stats.precision import at_once
from tdprobe.stats.seen import Seen

# Numbers that are looked at together, which stay in the cache.
COMPARED = 2**18
# Points in doubt that are measured together.
HELD = 2**16


def ranks_of_one(seen: Seen, other: Int[Tensor, "r l"]) -> Float[Tensor, "r l"]:
    """Rank one row of each of l layers: count what is surely nearer, and measure what may be."""
    space, own = seen.space, seen.space.own[seen.rows].unsqueeze(1)
    # Layers agree on many of their nearest rows.
    point, place = _distinct(space.own[other])
    copy, none = point == own, point < 0
    # The block says how far a row is up to its slack, and of the points around it the same.
    measure = seen.block.gather(1, point.clamp(min=0)).double().masked_fill(copy, 0)
    slack = 2 * seen.slack(seen.ceiling(measure + seen.offset.unsqueeze(1), point))
    # A row's own copies are at distance 0, and its point was left out of the block.
    bounds = ((measure + sign * slack).to(seen.block.dtype).masked_fill(copy | none, -torch.inf) for sign in (-1, 1))
    targets = _Targets(point, *bounds)
    sums = torch.zeros_like(measure), space.repeats[point].double()
    near, far = _among_nearest(seen, targets, sums)
    held = [near]
    for doubts in _among_all(seen, targets, far, sums):
        held.append(doubts)
        # They are few as a rule, and measured together; where points are tied they may be all.
        if sum(some.shape[1] for some in held) > at_once(HELD, point.device):
            held = _decide(seen, targets, held, sums)
    _decide(seen, targets, held, sums)
    copies, (nearer, tied) = (space.repeats[own] - 1).double(), sums
    return torch.where(copy, (copies + 1) / 2, copies + nearer + (tied + 1) / 2).gather(1, place)


def _distinct(point: Int[Tensor, "r l"]) -> tuple[Int[Tensor, "r m"], Int[Tensor, "r l"]]:
    """List the numbers of each row once, then -1, and say where each of them is listed."""
    ordered, order = point.sort(1)
    number = torch.zeros_like(point)
    number[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    listed = point.new_full((len(point), int(number.max()) + 1), -1).scatter_(1, number, ordered)
    return listed, torch.empty_like(point).scatter_(1, order, number)


@dataclass
class _Targets:
    """Points to rank, and between which measures of the block there may be others as near as they are.

    Attributes:
        point: ``(r, m)``, -1 where a row has fewer.
        low: ``(r, m)`` in the dtype of the block; below everything where there is no target.
        high: The same.
    """

    point: Tensor
    low: Tensor
    high: Tensor

    @cached_property
    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three, flattened."""
        return self.point.flatten(), self.low.flatten(), self.high.flatten()


Sums = tuple[Tensor, Tensor]
# Targets, by their place among all, and points that may be as near, ``(2, t)``.
Doubts = Int[Tensor, "2 _"]


def _among_nearest(seen: Seen, targets: _Targets, sums: Sums) -> tuple[Doubts, Bool[Tensor, "r m"]]:
    """Rank the targets that are among the nearest points, whose order is known; also tell which ones are not."""
    near, space, (nearer, tied) = seen.near, seen.space, sums
    first = torch.searchsorted(near, targets.low.contiguous())
    last = torch.searchsorted(near, targets.high.contiguous(), right=True)
    # Points that are not listed are no nearer than the last one that is.
    far = (targets.high >= near[:, -1:]) & (near.shape[1] < space.points)
    before = torch.nn.functional.pad(space.repeats[seen.points].cumsum(1).double(), (1, 0))
    nearer.copy_(before.gather(1, first))
    (which,) = (~far & (before.gather(1, last) - nearer > tied)).flatten().nonzero().unbind(1)
    start, length = first.flatten()[which], (last - first).flatten()[which]
    column = torch.arange(int(length.sum()), device=near.device)
    column += (start - length.cumsum(0) + length).repeat_interleave(length)
    which = which.repeat_interleave(length)
    return torch.stack([which, seen.points[which // first.shape[1], column]]), far


def _among_all(seen: Seen, targets: _Targets, far: Bool[Tensor, "r m"], sums: Sums) -> Iterator[Doubts]:
    """Count what is nearer than the targets that are far, some rows at a time, and find what may be as near."""
    size = max(1, COMPARED // seen.space.points) if far.device.type == "cpu" else len(far)
    scratch = torch.empty_like(seen.block[:size])
    for start in range(0, len(far), size):
        part = slice(start, start + size)
        (which,) = far[part].flatten().nonzero().unbind(1)
        ordered = len(which) > sorting_pays_from(far.device) * len(far[part])
        if ordered:
            which = _by_sorting(seen, targets, part, which, sums, scratch)
        yield from _by_comparing(seen, targets, which + start * far.shape[1], None if ordered else sums, scratch)


def _by_comparing(seen: Seen, targets: _Targets, which: Tensor, sums: Sums | None, scratch: Tensor) -> Iterator[Doubts]:
    """Compare every point with some targets, what few take: find what may be as near, and count what is nearer."""
    space, count = seen.space, targets.point.shape[1]
    _, low, high = targets.flat
    more = (space.repeats[space.several] - 1).double()
    for some in which.split(len(scratch)):
        block = torch.index_select(seen.block, 0, some // count, out=scratch[: len(some)])
        found = parted(block, low[some], high[some])
        if sums is not None:
            sums[0].view(-1)[some] = found.below + found.mask[:, space.several].double() @ more
        yield torch.stack([some[found.row], found.place])


def _by_sorting(
    seen: Seen, targets: _Targets, part: slice, which: Tensor, sums: Sums, scratch: Tensor
) -> Int[Tensor, " t"]:
    """Sort the points of some rows once for all targets, what many take; return which have others as near."""
    space, (nearer, tied) = seen.space, (total[part] for total in sums)
    low, high, block = targets.low[part].contiguous(), targets.high[part].contiguous(), seen.block[part]
    ordered = sort_in_place(scratch[: len(block)].copy_(block))
    below, upto = torch.searchsorted(ordered, low).double(), torch.searchsorted(ordered, high, right=True).double()
    if len(space.several):
        # Copies count for themselves. Few points have any, and sorting with places and weights takes its time.
        ordered, order = block[:, space.several].sort(1)
        more = torch.nn.functional.pad((space.repeats[space.several] - 1).double()[order].cumsum(1), (1, 0))
        below += more.gather(1, torch.searchsorted(ordered, low))
        upto += more.gather(1, torch.searchsorted(ordered, high, right=True))
    nearer.view(-1)[which] = below.flatten()[which]
    # The target itself is in doubt always; with any other point beside it the two are measured.
    return which[(upto - below > tied).flatten()[which]]


def _decide(seen: Seen, targets: _Targets, doubts: list[Doubts], sums: Sums) -> list[Doubts]:
    """Measure the points in doubt, and add those that are nearer than their target, and those tied with it, to sums.

    Args:
        seen: All measures of the rows.
        targets: What is ranked.
        doubts: What may be as near.
        sums: How many points are nearer than each target, and how many as near.

    Returns:
        What is left in doubt, nothing.
    """
    space, point, count = seen.space, targets.flat[0], targets.point.shape[1]
    which, near = doubt = torch.cat(doubts, 1)
    nearer, tied = (total.view(-1) for total in sums)
    other = near != point[which]
    which, near = which[other], near[other]
    if seen.block.dtype == torch.float32 and not space.nothing_rounds:
        which, near = _narrowed(seen, targets, (which, near), nearer)
    measured, inverse = which.unique(return_inverse=True)
    goal = space.exact(seen.rows[measured // count], point[measured])[inverse]
    measure, amount = space.exact(seen.rows[which // count], near), space.repeats[near].double()
    nearer.index_add_(0, which, amount * (measure < goal * (1 - TIE)))
    tied.index_add_(0, which, amount * ((measure - goal).abs() <= goal * TIE))
    return [doubt[:, :0]]


def _narrowed(seen: Seen, targets: _Targets, doubts: tuple[Tensor, Tensor], nearer: Tensor) -> tuple[Tensor, Tensor]:
    """Add what products in float64 show to be nearer, and return what they leave in doubt."""
    space, point, count = seen.space, targets.flat[0], targets.point.shape[1]
    which, near = doubts
    measured, inverse = which.unique(return_inverse=True)
    rows, goals = seen.rows[measured // count], point[measured]
    # All pairs of a row together.
    order = torch.cat([measured, which]).sort(stable=True).indices
    pairs = torch.cat([rows, seen.rows[which // count]])[order], torch.cat([goals, near])[order]
    goal, measure = (
        torch.empty_like(order, dtype=torch.float64)
        .scatter_(0, order, space.fine(*pairs))
        .split([len(goals), len(near)])
    )
    reach = space.ceiling(rows, goal.unsqueeze(1), goals.unsqueeze(1), torch.float64)
    slack = 2 * space.slack(rows, reach.squeeze(1), torch.float64)[inverse]
    gap = measure - goal[inverse]
    nearer.index_add_(0, which, space.repeats[near].double() * (gap < -slack))
    kept = gap.abs() <= slack
    return which[kept], near[kept]
