"""Distances within one layer: by products where rounding cannot matter, by differences where it could."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.stats.differences import differences_at
from tdprobe.stats.middle import centre_of_most
from tdprobe.stats.order import distinct_rows
from tdprobe.stats.precision import at_once, float32_is_exact
from tdprobe.stats.products import SLICE, Centred, exact_in_float64, in_float64, in_slices, products_at

# Numbers in one step of differences, which stay in the cache.
STEP = 2**16
# Distances that agree to this relative precision are tied: sums in float64 say no more.
TIE = 1e-12
# Numbers in the exact distances of some rows to all points.
EXACT_BLOCK = 2**20
# A product of single pairs takes the time of this many entries of a block on the CPU, where float64 doubles the block.
PAIR_COST = 20


class Space:
    """Hold the rows of one layer of one data set, and measure how far they are from its distinct rows.

    The distinct rows are called points. A *measure* grows with the distance, so that it can stand for it:
    squared and scaled by `scale` squared for p = 2, the distance itself otherwise. `block` is fast and comes
    with a bound, `slack`, on how far it may be off; `exact` and `exact_block` sum differences in float64,
    or take products in float64 where those round nothing.

    Args:
        rows: ``(n, d)`` real and finite.
        p: Order of the norm.
        asked: About how many measures of each row must be better than float32 makes them. Where they are many, blocks
            in float64 cost less than blocks in float32 and those measures together.

    Attributes:
        own: Point of each row, ``(n,)`` int64.
        first: A row of each point, ``(u,)`` int64.
        repeats: Rows of each point, ``(u,)`` int64.
        scale: A power of two that brings the largest centred entry near 1.
    """

    def __init__(self, rows: Float[Tensor, "n d"], p: float = 2.0, asked: int = 0) -> None:
        self.rows = rows if rows.shape[1] else rows.new_zeros(rows.shape[0], 1)
        self.p, self.asked = p, asked
        self.own, self.first, self.repeats = distinct_rows(self.rows)
        self.middle, spread = centre_of_most(self.rows.split(self._rows_at_once))
        if self.rows.dtype != torch.float64:
            # So that products in float32 and in float64 are of rows from the same middle.
            self.middle = self.middle.float().double()
        # Without this, entries of 1e30 or 1e-30 would leave float32 when squared.
        self.scale = 2.0 ** -max(-1000, min(1000, math.frexp(spread)[1])) if p == 2 else 1.0

    @property
    def repeated(self) -> Tensor:
        """Tell whether an earlier row is equal, ``(n,)`` bool."""
        return self.first[self.own] != torch.arange(len(self.own), device=self.own.device)

    @property
    def points(self) -> int:
        """Count the distinct rows."""
        return len(self.repeats)

    @cached_property
    def by_point(self) -> Tensor:
        """Rows in the order of their points: those of one point stand together."""
        return self.own.sort(stable=True).indices

    @cached_property
    def several(self) -> Tensor:
        """Points of more than one row."""
        return (self.repeats > 1).nonzero().squeeze(1)

    @property
    def _rows_at_once(self) -> int:
        return max(1, at_once(STEP, self.rows.device, 64) // self.rows.shape[1])

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of fast measures: float32, unless much must be exact, or the user has switched its products to less."""
        device = self.rows.device
        much = device.type == "cpu" and self.asked * PAIR_COST > self.points
        return torch.float64 if self.p != 2 or much or not float32_is_exact(device) else torch.float32

    def block(
        self, rows: Int[Tensor, "r"], dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Float[Tensor, "r u"]:
        """Return the measure of some rows to all points, up to a number per row (`offset`).

        ``|y|^2 - 2 x.y`` of centred rows in float32, where ``|x|^2`` would cost digits; in float64 the squared
        distance. The row's own point is at infinity. Computed in `dtype` by default.
        """
        if self.p != 2:
            return self.exact_block(rows)
        dtype = dtype or self.dtype
        out = torch.empty(len(rows), self.points, dtype=dtype, device=rows.device) if out is None else out
        if dtype == torch.float64:
            torch.mm(self._turned(rows), self._far.mT, out=out)
        else:
            in_slices(replace(self._single, rows=self.rows[rows], places=None), self._single, self._norms.square(), out)
        return out.scatter_(1, self.own[rows].unsqueeze(1), torch.inf)

    def _turned(self, rows: Int[Tensor, "r"]) -> Float[Tensor, "r e"]:
        """Return what gives squared distances of some rows when multiplied with all points as they are kept."""
        left = self._far[self.own[rows]]
        # (x, |x|^2, 1) becomes (-2 x, 1, |x|^2).
        left[:, :-2] *= -2
        left[:, -2:] = left[:, -2:].flip(1)
        return left

    def offset(self, rows: Int[Tensor, "r"], dtype: torch.dtype) -> Float[Tensor, "r"]:
        """Return what `block` in a dtype leaves out of each row, float64."""
        if self.p == 2 and dtype == torch.float32:
            return self._norms[self.own[rows]].square()
        return torch.zeros(len(rows), dtype=torch.float64, device=self.rows.device)

    def slack(self, rows: Int[Tensor, "r"], reach: Float[Tensor, "r *k"], dtype: torch.dtype) -> Float[Tensor, "r *k"]:
        """Bound the error of `block` + `offset` for points within a reach, with room for ties.

        A point whose measure is at most ``reach`` is off by at most the slack; one beyond it never seems nearer
        than ``reach`` less the slack.

        Args:
            rows: Places of the rows.
            reach: Measures up to which points matter.
            dtype: What `block` computed in.
        """
        return self.rounding(rows, reach, dtype) + torch.where(reach < torch.inf, 4 * TIE * reach, 0)

    def rounding(self, rows: Tensor, reach: Float[Tensor, "r *k"], dtype: torch.dtype) -> Float[Tensor, "r *k"]:
        """Bound the rounding errors of `block` + `offset`, as `slack` does.

        The error of a product of m terms is at most ``m u |x| |y|`` (Higham 2002, section 3.1), with
        ``4 |x| |y| <= (|x| + |y|)^2`` and ``|y| <= |x| + distance``.
        """
        if self.p != 2:
            return torch.zeros_like(reach)
        norm, gamma = self._norms[self.own[rows]], self.gamma(dtype)
        norm = norm.reshape(-1, *[1] * (reach.ndim - 1))
        far = torch.maximum(reach.sqrt(), 3 * gamma * norm).clamp(max=2 * self._longest)
        total = norm + (norm + far).clamp(max=self._longest)
        return gamma * total.square() + self._tiny(dtype)

    def ceiling(self, rows: Int[Tensor, "r"], measure: Tensor, points: Tensor, dtype: torch.dtype) -> Tensor:
        """Return upper bounds of exact measures, given those of `block` + `offset`, ``(r, k)``."""
        if self.p != 2:
            return measure * (1 + 4 * TIE)
        total = self._norms[self.own[rows]].unsqueeze(1) + self._norms[points]
        return measure.clamp(min=0) + self.gamma(dtype) * total.square() + self._tiny(dtype)

    def gamma(self, dtype: torch.dtype) -> float:
        """Return the error of a squared distance relative to ``(|x| + |y|)^2``."""
        width = self.rows.shape[1]
        # In float32 a CPU has several sums for a slice; float64 has digits for any order.
        lanes = 2 if self.rows.device.type == "cpu" else 1
        terms = width if dtype == torch.float64 else min(width, SLICE) / lanes + math.ceil(width / SLICE)
        return (terms + 13) * torch.finfo(dtype).eps / 2

    def _tiny(self, dtype: torch.dtype) -> float:
        # What underflow may take from each product.
        return 4 * self.rows.shape[1] * torch.finfo(dtype).tiny

    def fine(self, rows: Int[Tensor, "m"], points: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
        """Return the measures of pairs of a row and another point as `block` has them in float64, or better.

        Fastest where all pairs of a row stand together.
        """
        if self.p != 2:
            return self._from_differences(rows, points)
        some, place, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
        if len(rows) * PAIR_COST > 2 * len(some) * self.points:
            return self.block(some, torch.float64)[place, points]
        if self.rows.device.type != "cpu":
            return self._from_differences(rows, points)
        return products_at(self._turned(some), self._far, counts, points)

    def exact(self, rows: Int[Tensor, "m"], points: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
        """Return the measures of pairs of a row and a point, float64, as the differences of given values have them."""
        if self.nothing_rounds:
            return self.fine(rows, points).masked_fill_(self.own[rows] == points, 0)
        return self._from_differences(rows, points)

    def _from_differences(self, rows: Int[Tensor, "m"], points: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
        return differences_at(self.rows, (rows, self.first[points]), self.p, self.scale, self._rows_at_once)

    def exact_block(self, rows: Int[Tensor, "r"]) -> Float[Tensor, "r u"]:
        """Return the measures of some rows to all points, float64; the row's own point is at infinity."""
        if self.nothing_rounds:
            return self.block(rows, torch.float64)
        mode = "donot_use_mm_for_euclid_dist"
        out = torch.cdist(self._wide[self.own[rows]], self._wide, self.p, compute_mode=mode)
        out = out.mul_(self.scale).square_() if self.p == 2 else out
        return out.scatter_(1, self.own[rows].unsqueeze(1), torch.inf)

    @cached_property
    def nothing_rounds(self) -> bool:
        """Tell whether products in float64 stand for differences, as those of one-hot, binary and integer rows do."""
        # Other rows show by the first one as a rule.
        parts = chain((self.middle, self.rows[:1]), self.rows.split(self._rows_at_once))
        return self.p == 2 and exact_in_float64((part.double() * self.scale for part in parts), self._longest)

    def distance(self, measure: Tensor) -> Tensor:
        """Turn measures into distances."""
        return measure.sqrt() / self.scale if self.p == 2 else measure

    def measure(self, distance: float) -> float:
        """Turn a distance into a measure."""
        scaled = distance * self.scale
        # A power of a float raises where this overflows to infinity.
        return scaled * scaled if self.p == 2 else distance

    @cached_property
    def _wide(self) -> Tensor:
        return self.rows[self.first].double()

    @cached_property
    def _single(self) -> Centred:
        # A copy of all points in float32 would take as much memory as the bank.
        shift = (-self.scale * self.middle).to(torch.promote_types(self.rows.dtype, torch.float32))
        return Centred(self.rows, shift, self.scale, None if self.points == len(self.rows) else self.first)

    @property
    def _norms(self) -> Tensor:
        return self._kept[1]

    @cached_property
    def _kept(self) -> tuple[Tensor, Tensor]:
        # On the CPU products of single pairs are taken in float64, whatever blocks are in.
        keep = self.rows.device.type == "cpu" or self.dtype == torch.float64
        return self._wide_points(self.points if keep else 0)

    @cached_property
    def _far(self) -> Tensor:
        kept = self._kept[0]
        return kept if len(kept) else self._wide_points(self.points)[0]

    def _wide_points(self, kept: int) -> tuple[Tensor, Tensor]:
        return in_float64(replace(self._single, shift=-self.scale * self.middle), kept, self._rows_at_once)

    @cached_property
    def _longest(self) -> float:
        return float(self._norms.max())
