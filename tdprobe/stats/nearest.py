"""The nearest points of rows: candidates from fast measures, decided by exact ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdprobe._types import Bool, Float, Int
from tdprobe.stats.distances import EXACT_BLOCK, TIE, Space
from tdprobe.stats.order import ascending
from tdprobe.stats.precision import at_once
from tdprobe.stats.seen import Seen

# Candidates beyond the wanted ones: as many as settle almost every row, then as many as settle small clusters.
FEW, MANY = 8, 64
# Measures of products that are this exact, relative to themselves, need no better ones unless they are in doubt.
FINE = 1e-11


@dataclass(frozen=True)
class Wanted:
    """Say which neighbours to find.

    Args:
        ranks: 1 for the nearest, ascending.
        distinct: Count rows that are equal once; a row's own copies are never its neighbours.
        beyond: Without ``distinct``: distances up to this do not count.
        ties: Find all points that are as near as the nearest one (with ``distinct`` only).
        places: Say which the nearest points are, this many, as far as ``ranks`` tell them apart.
    """

    ranks: tuple[int, ...]
    distinct: bool = True
    beyond: float = 0.0
    ties: bool = False
    places: int = 0

    @property
    def few(self) -> int:
        """Candidates that settle almost every row."""
        return self.ranks[-1] + FEW + self.ranks[-1] // 32

    @property
    def many(self) -> int:
        """Candidates that settle small clusters."""
        return self.few - FEW + MANY


@dataclass
class Nearest:
    """What was found for some rows.

    Attributes:
        measures: Exact measure of the neighbour of each rank, ``(r, q)`` float64, infinite where there is none.
        row: With ``point``: which row has which nearest point, ``(t,)`` int64, ascending.
        point: The points.
        order: The nearest points, nearest first, ``(r, places)`` int64, -1 where there is none.
    """

    measures: Tensor
    row: Tensor
    point: Tensor
    order: Tensor


def find_nearest(seen: Seen, wanted: Wanted) -> Nearest:
    """Find the wanted neighbours of some rows, exactly.

    Args:
        seen: All measures of the rows, and ``wanted.few`` of the smallest.
        wanted: Which neighbours.
    """
    space, rows = seen.space, seen.rows
    measures = torch.full((len(rows), len(wanted.ranks)), torch.inf, dtype=torch.float64, device=rows.device)
    places = torch.full((len(rows), wanted.places), -1, device=rows.device)
    todo, ties = torch.arange(len(rows), device=rows.device), []
    for again in (False, True):
        if again:
            block = space.block(rows[todo], torch.float64)
            seen = Seen.of(space, rows[todo], block, wanted.many)
        found, sure = _by_products(seen, wanted)
        measures[todo[sure]], places[todo[sure]] = found.measures[sure], found.order[sure]
        kept = sure[found.row]
        ties.append(torch.stack([todo[found.row[kept]], found.point[kept]]))
        todo = todo[~sure]
        if len(todo) == 0 or space.p != 2:
            break
    size = max(1, at_once(EXACT_BLOCK, rows.device) // space.points)
    for part in todo.split(size) if len(todo) else ():
        found = _by_differences(space, rows[part], wanted)
        measures[part], places[part] = found.measures, found.order
        ties.append(torch.stack([part[found.row], found.point]))
    row, point = torch.cat(ties, 1)
    row, order = row.sort(stable=True)
    return Nearest(measures, row, point[order], places)


def _by_products(seen: Seen, wanted: Wanted) -> tuple[Nearest, Tensor]:
    """Settle rows whose neighbours show among the candidates; also tell which rows those are.

    With ``a`` the fast measures, off by at most ``slack``: the neighbour of rank q has an ``a`` within ``slack``
    of the q-th smallest one, so only candidates within twice that may need a better measure. Products in float64 tell
    most of those apart that products in float32 cannot, and differences the rest.
    """
    space, rows, points = seen.space, seen.rows, seen.points.clone()
    a = seen.near.double() + seen.offset.unsqueeze(1)
    reach = space.ceiling(rows, a, points, seen.dtype).amax(1)
    slack = space.slack(rows, reach, seen.dtype).unsqueeze(1)
    cut = a[:, -1:].clone() if a.shape[1] < space.points else torch.full_like(slack, torch.inf)
    if not wanted.distinct and _leave_out(a, slack, space, rows, points, wanted):
        a, points = _sorted(a, points)
    # By products in float64, if they are better than those at hand, and by differences.
    for dtype in dict.fromkeys((seen.dtype, torch.float64)):
        centres = _at_ranks(space, a, points, wanted)
        doubt, rounding = (bound(rows, reach, dtype).unsqueeze(1) for bound in (space.slack, space.rounding))
        which, mixed = _in_doubt(a, centres, doubt, rounding > FINE * centres)
        row, column = (which & (a < torch.inf)).nonzero().unbind(1)
        a[row, column] = (space.fine if dtype == torch.float32 else space.exact)(rows[row], points[row, column])
        if len(mixed):
            a[mixed], points[mixed] = _sorted(a[mixed], points[mixed])
    sure = ((cut == torch.inf) | (cut > _at_ranks(space, a, points, wanted)[:, -1:] + 2 * slack)).squeeze(1)
    return _collect(space, a, points, wanted), sure


def _in_doubt(
    a: Tensor, centres: Tensor, slack: Tensor, rough: Tensor
) -> tuple[Bool[Tensor, "r m"], Int[Tensor, " t"]]:
    """Say which candidates need an exact measure, and in which rows their order may change by it.

    Args:
        a: Measures of the candidates, ``(r, m)``, ascending.
        centres: Those at the wanted ranks, ``(r, q)``, ascending.
        slack: How far measures may be off, ``(r, 1)``.
        rough: Where a measure is not exact enough even for a candidate that is alone near its rank, ``(r, q)``.
    """
    first = torch.searchsorted(a, (centres - 2 * slack).contiguous())
    last = torch.searchsorted(a, (centres + 2 * slack).contiguous(), right=True)
    several = (last - first > 1) & (centres < torch.inf)
    doubt = (several | rough).long()
    edges = torch.zeros(len(a), a.shape[1] + 1, dtype=torch.int64, device=a.device)
    edges.scatter_add_(1, first, doubt).scatter_add_(1, last, -doubt)
    # A candidate that is alone keeps its place.
    return edges.cumsum(1)[:, :-1] > 0, several.any(1).nonzero().squeeze(1)


def _by_differences(space: Space, rows: Tensor, wanted: Wanted) -> Nearest:
    """Measure some rows against all points: for data that is one cluster of equals to float64 products too."""
    block = space.exact_block(rows)
    if not wanted.distinct:
        block = torch.where(block > space.measure(wanted.beyond), block, torch.inf)
    a, points = block.topk(min(wanted.ranks[-1], space.points), largest=False)
    found = _collect(space, a, points, wanted)
    if wanted.ties:
        near = (block <= a[:, :1] * (1 + TIE)) & (block < torch.inf)
        found.row, found.point = near.nonzero().unbind(1)
    return found


def _collect(space: Space, a: Tensor, points: Tensor, wanted: Wanted) -> Nearest:
    near = (a <= a[:, :1] * (1 + TIE)) & (a < torch.inf) if wanted.ties else torch.zeros_like(a[:, :0]).bool()
    row, column = near.nonzero().unbind(1)
    order = points[:, : wanted.places].masked_fill(a[:, : wanted.places] == torch.inf, -1)
    order = torch.nn.functional.pad(order, (0, wanted.places - order.shape[1]), value=-1)
    return Nearest(_at_ranks(space, a, points, wanted), row, points[row, column], order)


def _sorted(a: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    order = ascending(a)
    return a.gather(1, order), points.gather(1, order)


def _at_ranks(space: Space, a: Float[Tensor, "r m"], points: Int[Tensor, "r m"], wanted: Wanted) -> Tensor:
    """Return the q-th smallest number of each row, with points counted as often as they are wanted; else infinity."""
    ranks = torch.tensor(wanted.ranks, device=a.device).expand(len(a), -1)
    if wanted.distinct or space.points == len(space.rows):
        places = (ranks - 1).clamp(max=a.shape[1])
    else:
        places = torch.searchsorted(space.repeats[points].cumsum(1), ranks.contiguous())
    return torch.nn.functional.pad(a, (0, 1), value=torch.inf).gather(1, places)


def _leave_out(a: Tensor, slack: Tensor, space: Space, rows: Tensor, points: Tensor, wanted: Wanted) -> bool:
    """Put points that are exactly within ``beyond`` at infinity, and tell whether there were any."""
    beyond = space.measure(wanted.beyond)
    row, column = ((a <= beyond + slack) & (a < torch.inf)).nonzero().unbind(1)
    within = space.exact(rows[row], points[row, column]) <= beyond
    a[row[within], column[within]] = torch.inf
    return bool(within.any())
