"""Rows of one layer made ready for products, and kernels fitted to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.rank_table import RankTable
from tdprobe.stats.state import centre

View = Literal["plain", "unit", "standard"]
Form = Literal["gram", "rbf", "distance", "square"]
# Rows, evenly spaced, for the median distance and the shape of the distribution of distances: all rows up to that many.
SAMPLE = 1024
# Rows, evenly spaced, that tell about where the values of a kernel lie.
EVEN = 64
# Rows at a time where float64 is needed for a moment.
STEP = 512


@dataclass(frozen=True)
class Kernel:
    """Say what number two rows of a layer make.

    Args:
        form: ``"gram"``: the inner product of centred rows; ``"distance"``: Euclidean; ``"square"``: squared;
            ``"rbf"``: ``exp(-distance^2 / (2 b^2))`` with ``b = threshold * sqrt(m)`` and m the median squared
            distance of rows that differ, over at most 1,024 rows, evenly spaced.
        view: The rows as they are (``"plain"``), scaled to length one (``"unit"``; a row of zeros stays one), or
            so after the mean over the columns is taken off each row (``"standard"``). Half of the squared distance
            is then one minus the cosine, or one minus the correlation.
        threshold: Bandwidth of ``"rbf"``.
        ranks: Replace the values by their ranks among all pairs of rows (see `RankTable`).
    """

    form: Form
    view: View = "plain"
    threshold: float = 1.0
    ranks: bool = False


class Rows:
    """Hold the rows of one layer of one data set, centred, and scaled to a median length between 1/2 and 1.

    Args:
        rows: ``(n, d)`` finite.
        view: See `Kernel`.
        dtype: Of the products.
        device: Where to compute.

    Attributes:
        points: ``(n, d)``.
        squares: Squared lengths, ``(n,)``, with what makes a row of zeros as far as an orthogonal one.
        scale: The power of two that points are scaled by.
        spread: Sum of squared distances to the mean, scaled like the points.
        power: Sum of squares before centring, scaled alike.
    """

    def __init__(self, rows: Float[Tensor, "n d"], view: View, dtype: torch.dtype, device: torch.device) -> None:
        x = rows.to(device)
        empty = torch.zeros(len(x), dtype=torch.bool, device=device)
        if view == "plain":
            points, middle = centre(x, dtype) if x.numel() else (x.to(dtype), x.new_zeros(x.shape[1]).double())
        else:
            points, middle, empty = _directions(x, view, dtype)
        # Squares of entries like 1e25 would leave float32: first the largest entry, then the typical row.
        scale = _scale(float(points.abs().amax()) if points.numel() else 0.0)
        lengths = torch.linalg.vector_norm(points.mul_(scale), dim=1, dtype=torch.float64)
        rest = min(2.0**20, _scale(_typical(lengths)))
        self.points, self.scale, lengths = points.mul_(rest), scale * rest, (lengths * rest).square()
        self.spread = float(lengths.sum())
        self.power = self.spread + len(x) * float((middle * self.scale).square().sum())
        self.lengths = lengths
        self.squares = (lengths + empty.double() * self.scale**2).to(dtype)
        # Squared distances below this are rounding errors of zero.
        self.noise = torch.finfo(dtype).eps * max(16.0, math.sqrt(x.shape[1]))

    def square(self, gram: Tensor, left: slice | Tensor, right: slice | Tensor, out: Tensor) -> Tensor:
        """Turn inner products of some points with others into squared distances."""
        torch.add(self.squares[left].unsqueeze(1), self.squares[right], out=out).sub_(gram, alpha=2)
        return torch.threshold_(out, self.noise, 0.0)

    def between(self, left: slice | Tensor, right: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return inner products and squared distances of some points with others."""
        gram = self.points[left] @ self.points[right].mT
        return gram, self.square(gram, left, right, torch.empty_like(gram))

    def sample(self) -> Float[Tensor, "m"]:
        """Return the squared distances of all pairs of rows, ascending; of 1,024 rows where there are more."""
        chosen = spaced(len(self.points), SAMPLE, self.points.device)
        square = self.between(chosen, chosen)[1]
        return ascending(square[torch.ones_like(square, dtype=torch.bool).triu_(1)])


class Fitted:
    """A kernel with what it takes from the rows of a layer.

    Attributes:
        shift: ``(n,)``; the walk sums ``K_ij - shift_i - shift_j``, which lie near zero, so that little cancels when
            sums are centred.
        diagonal: ``K_ii``, ``(n,)`` float64.
    """

    def __init__(self, kernel: Kernel, rows: Rows) -> None:
        n = len(rows.points)
        self.kernel, self.rows, self.factor = kernel, rows, 0.0
        self.table = RankTable(rows) if kernel.ranks else None
        self.diagonal = rows.lengths if kernel.form == "gram" else torch.full_like(rows.lengths, kernel.form == "rbf")
        self.shift = torch.zeros(n, dtype=rows.points.dtype, device=rows.points.device)
        if kernel.form == "rbf":
            # NaN where no two rows differ.
            self.factor = -0.5 / (kernel.threshold**2 * median(rows.sample()))
        if kernel.form != "gram" and n > 1:
            self.shift = self._expected()

    def fill(self, out: Tensor, gram: Tensor, square: Tensor, left: slice, right: slice) -> None:
        """Write the shifted values for some points with others."""
        self._values(gram, square, out)
        if self.kernel.form != "gram":
            out.sub_(self.shift[left].unsqueeze(1)).sub_(self.shift[right])

    def _values(self, gram: Tensor, square: Tensor, out: Tensor) -> None:
        if self.table is not None:
            self.table.ranks(square, out)
        elif self.kernel.form == "rbf":
            torch.mul(square, self.factor, out=out).exp_()
        elif self.kernel.form == "distance":
            torch.sqrt(square, out=out)
        else:
            out.copy_(gram if self.kernel.form == "gram" else square)

    def _expected(self) -> Float[Tensor, "n"]:
        """Estimate the mean value of each row from a few others, half of the mean of all taken off."""
        n, device = len(self.rows.points), self.rows.points.device
        chosen = spaced(n, EVEN, device)
        gram, square = self.rows.between(slice(None), chosen)
        values = torch.empty_like(gram)
        self._values(gram, square, values)
        own = torch.arange(n, device=device).unsqueeze(1) == chosen
        others = (len(chosen) - own.sum(1)).clamp(min=1)
        means = values.masked_fill(own, 0).sum(1) / others
        return means - means.mean() / 2


def spaced(n: int, most: int, device: torch.device) -> Tensor:
    """Return the places of ``most`` of n rows, evenly spaced; of all where there are no more."""
    count = min(n, most)
    return torch.arange(count, device=device) * n // max(1, count)


def median(sample: Float[Tensor, "m"]) -> float:
    """Return the median of the positive ones of ascending numbers, NaN where there are none."""
    found = sample[torch.searchsorted(sample, 0.0, right=True) :]
    if len(found) == 0:
        return math.nan
    return (float(found[(len(found) - 1) // 2]) + float(found[len(found) // 2])) / 2


def ascending(values: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Sort numbers."""
    # Vectorised sorting, which torch does not have on the CPU: a twentieth of the time.
    return values.sort().values if values.device.type != "cpu" else torch.from_numpy(np.sort(values.numpy()))


def _typical(lengths: Float[Tensor, "n"]) -> float:
    """Return the median length, or the mean where that is zero: outlying rows must not make the others small."""
    return float(lengths.median()) or float(lengths.mean()) if len(lengths) else 0.0


def _scale(size: float) -> float:
    """Return the power of two that brings a size near 1: it costs no digits."""
    return 2.0 ** -math.frexp(size)[1] if size > 0 else 1.0


def _directions(x: Tensor, view: View, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scale rows to length one; return them centred, their mean in float64, and which rows have no direction."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    empty = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), STEP):
        part, empty[start : start + STEP] = _unit(x[start : start + STEP], view)
        total += part.sum(0)
    middle, points = total / max(1, len(x)), torch.empty(x.shape, dtype=dtype, device=x.device)
    for start in range(0, len(x), STEP):
        points[start : start + STEP] = _unit(x[start : start + STEP], view)[0] - middle
    return points, middle, empty


def _unit(x: Tensor, view: View) -> tuple[Tensor, Tensor]:
    z = x.double()
    largest = z.abs().amax(1, keepdim=True) if x.shape[1] else z.new_zeros(len(x), 1)
    z = z / torch.where(largest > 0, largest, 1)
    if view == "standard":
        z = z - z.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    # A row of equal numbers is left with rounding errors, which are no direction.
    empty = length <= 1e-14 * math.sqrt(max(1, x.shape[1]))
    return torch.where(empty, 0, z / torch.where(empty, 1, length)), empty.squeeze(1)
