"""Columns that are sorted once, and exact counts of the values near each of their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float, Int, Real

# Distances that differ by less than this share count as equal: on a grid of tenths they differ by rounding only. Two
# distances of continuous values are that close once in ten billion.
EQUAL = 1e-10

# Rounded values lie between minus and plus this: four times as much is out of reach, and no difference leaves int32.
WIDTH = 2**28


@dataclass(frozen=True)
class Columns:
    """Hold columns in ascending order.

    Args:
        values: Ascending values, ``(c, n)`` float64, or int32 if `rounded`.
        order: Sample at each place, ``(c, n)`` int64.
    """

    values: Tensor
    order: Tensor

    @classmethod
    def of(cls, x: Float[Tensor, "n c"]) -> Columns:
        """Sort every column."""
        values, order = x.mT.contiguous().sort(dim=-1)
        return cls(values, order)

    def __getitem__(self, part: slice) -> Columns:
        """Return some of the columns."""
        return Columns(self.values[part], self.order[part])

    @cached_property
    def place(self) -> Int[Tensor, "c n"]:
        """Place of each sample, the inverse of ``order``."""
        places = torch.arange(self.order.shape[-1], device=self.order.device).expand_as(self.order)
        return torch.empty_like(self.order).scatter_(-1, self.order, places)

    @cached_property
    def scale(self) -> Float[Tensor, " c"]:
        """Standard deviation, 1 for a constant column; of sorted values, so that no row order rounds it differently."""
        spread, half = self.values.std(-1, correction=0), self.half
        # Squares of tiny and huge values are 0 and infinite.
        safe = (self.values / half.unsqueeze(-1)).std(-1, correction=0) * half
        return torch.where(half == 0, 1.0, torch.where((spread > 1e-150) & (spread < 1e150), spread, safe))

    @cached_property
    def half(self) -> Float[Tensor, " c"]:
        """Half the range."""
        return self.values[:, -1] / 2 - self.values[:, 0] / 2

    @cached_property
    def group(self) -> Int[Tensor, "c n"]:
        """Number of distinct values before each value."""
        return runs(self.values)

    @cached_property
    def copies(self) -> Int[Tensor, "c n"]:
        """How often each value occurs."""
        return occurrences(self.group)

    @cached_property
    def padded(self) -> Real[Tensor, "c p"]:
        """Append infinity up to one less than a power of two."""
        n = self.values.shape[-1]
        return torch.nn.functional.pad(self.values, (0, 2 ** n.bit_length() - 1 - n), value=infinity(self.values))

    def rounded(self, unit: Tensor) -> Columns:
        """Round to whole numbers, int32, of which a standard deviation has ``unit`` and half the range `WIDTH`."""
        middle = self.values[:, :1] / 2 + self.values[:, -1:] / 2
        numbers = (self.values - middle) / self.scale.unsqueeze(-1) * unit
        return Columns(numbers.round().int(), self.order)


def infinity(values: Tensor) -> float:
    """Return what is beyond every value, and further from each of them than any other."""
    return torch.inf if values.is_floating_point() else 4 * WIDTH


def digamma_table(n: int, device: torch.device) -> Float[Tensor, " m"]:
    """Tabulate psi(0), ..., psi(n), float64."""
    return torch.arange(n + 1, dtype=torch.float64, device=device).digamma()


def runs(*sorted_columns: Tensor) -> Int[Tensor, "c n"]:
    """Number the runs of equal values, 0, 1, ... in each column; of several sorted columns, of equal tuples."""
    changes = [x.diff(dim=-1, prepend=x[..., :1]) != 0 for x in sorted_columns]
    return torch.stack(changes).any(0).cumsum(-1)


def occurrences(run: Int[Tensor, "c n"]) -> Int[Tensor, "c n"]:
    """Count how long the run of each value is."""
    return torch.zeros_like(run).scatter_add_(-1, run, torch.ones_like(run)).gather(-1, run)


def inside(
    padded: Real[Tensor, "c p"],
    column: Tensor,
    centre: Real[Tensor, "*q"],
    radius: Real[Tensor, "*q"],
    factor: Tensor | None = None,
    *,
    closed: bool = False,
) -> tuple[Int[Tensor, "*q"], Int[Tensor, "*q"]]:
    """Find the values with ``factor * |value - centre|`` below a radius (at most the radius if ``closed``).

    Distances within a share of `EQUAL` of the radius count as equal to it. Distances are compared, not places: a search
    for ``centre + radius`` would misplace values by rounding, and nearly every radius is the distance of some value.
    Whole numbers are compared as they are.

    Args:
        padded: Ascending values as in `Columns.padded`.
        column: Column to look in, broadcasts to ``centre``.
        centre: Centres.
        radius: Radii, above 0 unless ``closed``.
        factor: Broadcasts to ``centre``; 1 by default.
        closed: Let values on the border in.

    Returns:
        Places of the first such value and of the first beyond them.
    """
    start = column * padded.shape[-1] - 1
    if padded.is_floating_point():
        radius = radius * (1 + EQUAL if closed else 1 - EQUAL)
    before, within = (torch.gt, torch.le) if closed else (torch.ge, torch.lt)
    sign = 1 if factor is None else factor
    first = _count_while(padded, start, lambda value, holds: before(value.mul_(-sign), radius, out=holds), centre)
    return first, _count_while(padded, start, lambda value, holds: within(value.mul_(sign), radius, out=holds), centre)


def _count_while(padded: Tensor, start: Tensor, condition: Callable[[Tensor, Tensor], Any], centre: Tensor) -> Tensor:
    """Count the leading values whose difference to the centre meets a condition, bit by bit for all centres at once."""
    # Adding whether a condition holds is three times as fast in int32.
    start = start.int() if padded.numel() < 2**31 else start
    values, place = padded.view(-1), start.expand(centre.shape).clone(memory_format=torch.contiguous_format)
    # Memory that is asked for anew in every step would cost as much as the steps.
    ahead, value = torch.empty_like(place), torch.empty(centre.shape, dtype=centre.dtype, device=centre.device)
    holds = torch.empty(centre.shape, dtype=torch.bool, device=centre.device)
    step = (padded.shape[-1] + 1) // 2
    while step:
        torch.add(place, step, out=ahead)
        # Several times as fast as indexing.
        torch.index_select(values, 0, ahead.view(-1), out=value.view(-1))
        condition(value.sub_(centre), holds)
        place.add_(holds, alpha=step)
        step //= 2
    return place.sub_(start)


def nearest_in_line(values: Float[Tensor, "*lead n"], k: Tensor | int, most: int, group: Tensor) -> Tensor:
    """Measure the distance of each of some sorted values to its k-th neighbour in the same group.

    Args:
        values: Ascending within each group, groups one after the other.
        k: Rank, an int or one per value, 1 to ``most``; every group has more than k values.
        most: Largest rank.
        group: Group of each value, broadcasts to ``values``.
    """
    left, right = line_distances(values, most, group)
    found = torch.full_like(values, torch.inf)
    ranks = torch.as_tensor(k, device=values.device)
    for rank in range(1, most + 1):
        spans = [torch.maximum(left[s], right[rank - s]) for s in range(rank + 1)]
        shortest = torch.stack(spans).amin(0)
        found = torch.where(ranks == rank, shortest, found)
    return found


def line_distances(values: Float[Tensor, "*lead n"], most: int, group: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Measure how far the values 0, 1, ..., ``most`` places before and after are; infinite across groups."""
    group = group.expand(values.shape)
    left, right = [torch.zeros_like(values)], [torch.zeros_like(values)]
    for step in range(1, most + 1):
        gap = torch.where(group[..., step:] == group[..., :-step], values[..., step:] - values[..., :-step], torch.inf)
        left.append(torch.nn.functional.pad(gap, (step, 0), value=torch.inf))
        right.append(torch.nn.functional.pad(gap, (0, step), value=torch.inf))
    return left, right
