"""The nearest points of rows: candidates from fast measures, decided by exact ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.stats.distances import EXACT_BLOCK, TIE, Space
from tdprobe.stats.order import ascending, smallest

# Candidates beyond the wanted ones: as many as settle almost every row, then as many as settle small clusters.
MARGINS = {torch.float32: 4, torch.float64: 60}


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


def find_nearest(space: Space, rows: Int[Tensor, "r"], block: Tensor, wanted: Wanted) -> Nearest:
    """Find the wanted neighbours of some rows, exactly.

    Args:
        space: The layer.
        rows: Places of the rows.
        block: ``space.block(rows)``.
        wanted: Which neighbours.
    """
    measures = torch.full((len(rows), len(wanted.ranks)), torch.inf, dtype=torch.float64, device=rows.device)
    places = torch.full((len(rows), wanted.places), -1, device=rows.device)
    todo, ties = torch.arange(len(rows), device=rows.device), []
    for dtype in dict.fromkeys((space.dtype, torch.float64)):
        block = block if dtype == space.dtype else space.block(rows[todo], dtype)
        found, sure = _by_products(space, rows[todo], block, wanted, dtype)
        measures[todo[sure]], places[todo[sure]] = found.measures[sure], found.order[sure]
        kept = sure[found.row]
        ties.append(torch.stack([todo[found.row[kept]], found.point[kept]]))
        todo = todo[~sure]
        if len(todo) == 0 or space.p != 2:
            break
    for part in todo.split(max(1, EXACT_BLOCK // space.points)) if len(todo) else ():
        found = _by_differences(space, rows[part], wanted)
        measures[part], places[part] = found.measures, found.order
        ties.append(torch.stack([part[found.row], found.point]))
    row, point = torch.cat(ties, 1)
    row, order = row.sort(stable=True)
    return Nearest(measures, row, point[order], places)


def _by_products(
    space: Space, rows: Tensor, block: Tensor, wanted: Wanted, dtype: torch.dtype
) -> tuple[Nearest, Tensor]:
    """Settle rows whose neighbours show among the candidates; also tell which rows those are.

    With ``a`` the fast measures, off by at most ``slack``: the neighbour of rank q has an ``a`` within ``slack``
    of the q-th smallest one, so only candidates within twice that need an exact measure.
    """
    a, points = smallest(block, wanted.ranks[-1] + MARGINS[dtype] + wanted.ranks[-1] // 16)
    a = a.double() + space.offset(rows).unsqueeze(1)
    ceiling = space.ceiling(rows, a, points, dtype)
    slack = space.slack(rows, ceiling.amax(1), dtype).unsqueeze(1)
    cut = a.amax(1, keepdim=True) if a.shape[1] < space.points else torch.full_like(slack, torch.inf)
    if not wanted.distinct:
        _leave_out(a, a <= space.measure(wanted.beyond) + slack, space, rows, points, wanted)
    weights = _weights(space, points, wanted)
    a, points, weights = _sorted(a, points, weights)
    centres = _at_ranks(a, weights, wanted.ranks)
    close = (a.unsqueeze(2) - centres.unsqueeze(1)).abs() <= 2 * slack.unsqueeze(2)
    _make_exact(a, close.any(2), space, rows, points)
    # A candidate that is alone near its rank keeps its place.
    (mixed,) = (close.sum(1) > 1).any(1).nonzero().unbind(1)
    if len(mixed):
        a[mixed], points[mixed], weights[mixed] = _sorted(a[mixed], points[mixed], weights[mixed])
    sure = ((cut == torch.inf) | (cut > centres[:, -1:] + 2 * slack)).squeeze(1)
    return _collect(a, points, weights, wanted), sure


def _by_differences(space: Space, rows: Tensor, wanted: Wanted) -> Nearest:
    """Measure some rows against all points: for data that is one cluster of equals to float64 products too."""
    block = space.exact_block(rows)
    if not wanted.distinct:
        block = torch.where(block > space.measure(wanted.beyond), block, torch.inf)
    a, points = block.topk(min(wanted.ranks[-1], space.points), largest=False)
    found = _collect(a, points, _weights(space, points, wanted), wanted)
    if wanted.ties:
        near = (block <= a[:, :1] * (1 + TIE)) & (block < torch.inf)
        found.row, found.point = near.nonzero().unbind(1)
    return found


def _collect(a: Tensor, points: Tensor, weights: Tensor, wanted: Wanted) -> Nearest:
    near = (a <= a[:, :1] * (1 + TIE)) & (a < torch.inf) & wanted.ties
    row, column = near.nonzero().unbind(1)
    order = points[:, : wanted.places].masked_fill(a[:, : wanted.places] == torch.inf, -1)
    order = torch.nn.functional.pad(order, (0, wanted.places - order.shape[1]), value=-1)
    return Nearest(_at_ranks(a, weights, wanted.ranks), row, points[row, column], order)


def _weights(space: Space, points: Tensor, wanted: Wanted) -> Tensor:
    return torch.ones_like(points) if wanted.distinct else space.repeats[points]


def _sorted(a: Tensor, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    order = ascending(a)
    return a.gather(1, order), points.gather(1, order), weights.gather(1, order)


def _at_ranks(a: Float[Tensor, "r m"], weights: Int[Tensor, "r m"], ranks: tuple[int, ...]) -> Tensor:
    """Return the q-th smallest number of each row, each counted as often as its weight says; else infinity."""
    below = weights.cumsum(1)
    places = torch.stack([(below < q).sum(1) for q in ranks], 1)
    padded = torch.cat([a, torch.full_like(a[:, :1], torch.inf)], 1)
    return padded.gather(1, places)


def _make_exact(a: Tensor, which: Tensor, space: Space, rows: Tensor, points: Tensor) -> None:
    row, column = (which & (a < torch.inf)).nonzero().unbind(1)
    a[row, column] = space.exact(rows[row], points[row, column])


def _leave_out(a: Tensor, which: Tensor, space: Space, rows: Tensor, points: Tensor, wanted: Wanted) -> None:
    """Put points that are exactly within ``beyond`` at infinity."""
    row, column = (which & (a < torch.inf)).nonzero().unbind(1)
    measure = space.exact(rows[row], points[row, column])
    a[row, column] = torch.where(measure > space.measure(wanted.beyond), a[row, column], torch.inf)
