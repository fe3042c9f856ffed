"""The distance to the k-th neighbour in the plane of a latent and an attribute, in the maximum norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tdprobe._types import Float, Int, Real
from tdprobe.latent.disentanglement.columns import EQUAL, WIDTH, Columns, infinity, inside

Range = tuple[Tensor, Tensor]
# Numbers in a block of candidates.
BLOCK = 2**16
# How many neighbours to look at between two looks at who is done, and the share that may be left over.
STRIDE, REST = 8, 0.05
# A rounded distance, that of the k-th neighbour too, is off by at most 1 and the little that float64 rounds. If two of
# them differ by 3, the exact ones do by nearly 1, and are not `EQUAL`: a share of that of the largest is 0.05.
SLACK = 2


@dataclass(frozen=True)
class Plane:
    """Hold c latents and m attributes, samples in the order of each latent.

    Distances are in units of the latent: ``max(|dx|, factor |dy|)`` with the ratio of the standard deviations. Scaling
    differences, instead of values, keeps equal differences equal.

    Args:
        x: Latents, c columns.
        y: Attributes, m columns.
    """

    x: Columns
    y: Columns

    @cached_property
    def factor(self) -> Real[Tensor, "c m 1"]:
        """Units of the latent per unit of the attribute, which are the same after rounding."""
        if not self.x.values.is_floating_point():
            return torch.ones(len(self.x.values), len(self.y.values), 1, dtype=torch.int32, device=self.x.values.device)
        return (self.x.scale.unsqueeze(1) / self.y.scale).unsqueeze(-1)

    @cached_property
    def places(self) -> Int[Tensor, "c m n"]:
        """Place in the sorted attribute of each sample."""
        return self.y.place[:, self.x.order].transpose(0, 1).contiguous()

    @cached_property
    def across(self) -> Real[Tensor, "c m n"]:
        """Attribute of each sample."""
        m, n = self.y.values.shape
        return taken(self.y.values, self.places + n * torch.arange(m, device=self.places.device).unsqueeze(-1))

    @cached_property
    def along(self) -> Real[Tensor, "c m n"]:
        """Latent of each sample."""
        return self.x.values.unsqueeze(1).expand(self.places.shape)

    @cached_property
    def unit(self) -> Float[Tensor, ""]:
        """How many of the whole numbers in `rounded` are a standard deviation."""
        # Half a range is a standard deviation or more.
        return WIDTH / torch.cat([axis.half / axis.scale for axis in (self.x, self.y)]).clamp(min=1).max()

    @cached_property
    def rounded(self) -> Plane:
        """Round values to whole numbers, of which differences are exact and which take half the memory."""
        return Plane(self.x.rounded(self.unit), self.y.rounded(self.unit))

    def unrounded(self, radius: Int[Tensor, " q"], flat: Int[Tensor, " q"]) -> Float[Tensor, " q"]:
        """Bound the radii of samples, places in the flattened ``(c, m, n)``, from above by the rounded ones."""
        return (radius + SLACK) * (self.x.scale / self.unit)[flat // self.places[0].numel()]

    def border(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest distance that may be equal to a radius."""
        if self.x.values.is_floating_point():
            return radius, radius * (1 + EQUAL)
        return radius - SLACK, radius + SLACK

    def near(self, radius: Tensor, *, closed: bool = False) -> tuple[Range, Range]:
        """Find the range of values within a radius ``(c, m, n)`` of each sample, in the latent and in the attribute."""
        c, m = self.factor.shape[:2]
        latent = torch.arange(c, device=radius.device).view(c, 1, 1)
        attribute = torch.arange(m, device=radius.device).view(m, 1)
        x = inside(self.x.padded, latent, self.along, radius, closed=closed)
        return x, inside(self.y.padded, attribute, self.across, radius, self.factor, closed=closed)


def radii(plane: Plane, k: int) -> Real[Tensor, "c m n"]:
    """Measure the distance of every sample to its k-th neighbour."""
    nearest, left = _sweep(plane, k)
    if len(left):
        chosen = Chosen(plane, left)
        radius = torch.minimum(nearest.view(-1)[left], _beside(chosen, left, k))
        nearest.view(-1)[left] = chosen.radii(radius, k)
    return nearest


def _kth(dx: Tensor, dy: Tensor, k: int) -> Tensor:
    # The sample itself comes first.
    return torch.maximum(dx, dy).kthvalue(k + 1, -1).values


def _beside(chosen: Chosen, flat: Tensor, k: int) -> Tensor:
    """Measure the distance to the k-th nearest of those next to a sample in the attribute."""
    places = chosen.plane.places
    n = places.shape[-1]
    width = min(n, 2 * STRIDE + k + 1)
    first = (places.view(-1)[flat] - width // 2).clamp_(0, n - width)
    place = first.unsqueeze(-1) + torch.arange(width, device=flat.device)
    return _kth(*chosen.distances(slice(None), place, by_x=False), k)


def _sweep(plane: Plane, k: int) -> tuple[Real[Tensor, "c m n"], Int[Tensor, " q"]]:
    """Compare each sample with those at 1, 2, ... places in the latent; return distances and who is not done."""
    x, y, factor, scaled = plane.x.values, plane.across, plane.factor, plane.x.values.is_floating_point()
    n = x.shape[-1]
    # The attribute, memory for three steps of a sort, and the nearest distances: one tensor, for slicing costs time.
    held = y.new_full((4 + k, *y.shape), infinity(y))
    held[0] = y
    limit = min(n - 1, int(2 * (k * n) ** 0.5) + STRIDE)
    left = torch.ones_like(y, dtype=torch.bool)
    for step in range(1, limit + 1):
        (before, gap, *low), (after, _, *high) = (held.narrow(-1, at, n - step).unbind() for at in (0, step))
        torch.sub(after, before, out=gap).abs_()
        if scaled:
            gap.mul_(factor)
        torch.maximum(gap, (x[:, step:] - x[:, :-step]).unsqueeze(1), out=gap)
        _insert(low[2:], gap, low[:2])
        _insert(high[2:], gap, low[:2])
        if step % STRIDE == 0 or step == limit:
            left = _ahead(x, step + 1).unsqueeze(1) < held[-1]
            if int(left.sum()) <= REST * left.numel():
                break
    return held[-1], left.view(-1).nonzero().squeeze(-1)


def _insert(best: list[Tensor], value: Tensor, memory: list[Tensor]) -> None:
    """Sort a value into ascending ones, in place; the largest drops out."""
    for place, held in enumerate(best[:-1]):
        larger = torch.maximum(held, value, out=memory[place % 2])
        torch.minimum(held, value, out=held)
        value = larger
    torch.minimum(best[-1], value, out=best[-1])


def _ahead(x: Tensor, step: int) -> Tensor:
    """Measure how far the nearer of those ``step`` places before and after is along the latent; inf without any."""
    gap = x[:, step:] - x[:, :-step]
    wall = [(step, 0), (0, step)] if step < x.shape[-1] else []
    sides = [torch.nn.functional.pad(gap, ends, value=infinity(x)) for ends in wall]
    return torch.minimum(*sides) if sides else torch.full_like(x, infinity(x))


class Chosen:
    """Look at some samples and at the others that may lie within a radius of them.

    Args:
        plane: The plane.
        flat: Samples, places in the flattened ``(c, m, n)``.
    """

    def __init__(self, plane: Plane, flat: Tensor) -> None:
        m, n = plane.factor.shape[1], plane.x.values.shape[-1]
        pair = flat // n
        self.plane, self.pair, self.latent, self.attribute = plane, pair, pair // m, pair % m
        self.x = plane.x.values.view(-1)[self.latent * n + flat % n]
        self.y, self.factor = plane.across.view(-1)[flat], plane.factor.view(-1)[pair]

    def ranges(self, radius: Tensor, *, closed: bool = False) -> tuple[Range, Range]:
        """Find the places of the values within a radius, in the latent and in the attribute."""
        x = inside(self.plane.x.padded, self.latent, self.x, radius, closed=closed)
        return x, inside(self.plane.y.padded, self.attribute, self.y, radius, self.factor, closed=closed)

    def blocks(self, ranges: tuple[Range, Range]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Walk along the axis with fewer candidates.

        Yields:
            Some of the samples (places in ``flat``) and their distances to candidates along both axes,
            ``(samples, candidates)``, infinite where a sample has fewer candidates.
        """
        (x_first, x_end), (y_first, y_end) = ranges
        by_x = x_end - x_first <= y_end - y_first
        first = torch.where(by_x, x_first, y_first)
        count = torch.where(by_x, x_end - x_first, y_end - y_first)
        for axis in (True, False):
            rows = (by_x == axis).nonzero().squeeze(-1)
            rows = rows[count[rows].argsort(descending=True)]
            # Nothing is nearer than a radius of 0.
            while len(rows) and (most := int(count[rows[0]])) > 0:
                some, rows = rows.tensor_split([max(1, BLOCK // most)])
                offset = torch.arange(most, device=rows.device)
                beyond = offset >= count[some].unsqueeze(-1)
                place = (first[some].unsqueeze(-1) + offset).masked_fill_(beyond, 0)
                dx, dy = self.distances(some, place, by_x=axis)
                yield some, dx.masked_fill_(beyond, infinity(dx)), dy.masked_fill_(beyond, infinity(dy))

    def radii(self, radius: Tensor, k: int) -> Tensor:
        """Measure the distances to the k-th neighbours, which are at most a radius."""
        radius = radius.clone()
        for rows, dx, dy in self.blocks(self.ranges(radius)):
            if dx.shape[-1] > k:
                radius[rows] = torch.minimum(radius[rows], _kth(dx, dy, k))
        return radius

    def distances(self, some: Tensor | slice, place: Tensor, *, by_x: bool) -> tuple[Tensor, Tensor]:
        """Measure the distances to candidates, which are places in the sorted latent or attribute."""
        plane, n = self.plane, self.plane.x.values.shape[-1]
        in_x, in_y = self.latent[some].unsqueeze(-1) * n, self.attribute[some].unsqueeze(-1) * n
        if by_x:
            x = taken(plane.x.values, place + in_x)
            y = taken(plane.across, place + self.pair[some].unsqueeze(-1) * n)
        else:
            y = taken(plane.y.values, place + in_y)
            sample = taken(plane.y.order, place + in_y)
            x = taken(plane.x.values, taken(plane.x.place, sample + in_x) + in_x)
        dx, dy = x.sub_(self.x[some].unsqueeze(-1)), y.sub_(self.y[some].unsqueeze(-1))
        return dx.abs_(), dy.abs_().mul_(self.factor[some].unsqueeze(-1))


def taken(values: Tensor, place: Tensor) -> Tensor:
    """Look values up by their place in the flattened tensor, several times as fast as indexing does."""
    return values.view(-1).index_select(0, place.view(-1)).view(place.shape)
