"""Products of rows with points: of all in float32, by slices, and of single pairs in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product as pairs_of
from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.stats.precision import at_once

# Columns of one product and of one tile: short sums round less, and a tile stays in the cache meanwhile.
SLICE, TILE = 128, 1024
# Digits of float64, in bits.
DIGITS = 53


@dataclass(frozen=True)
class Centred:
    """Rows that are centred and scaled when their turn comes.

    Attributes:
        rows: ``(n, d)`` as they were given.
        shift: Scale times the origin, turned round, ``(d,)``.
        scale: A power of two.
        places: The rows that are meant, ``(u,)`` int64; all by default.
    """

    rows: Tensor
    shift: Tensor
    scale: float
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows if self.places is None else self.places)

    def write(self, part: slice, columns: slice, out: Tensor) -> Tensor:
        """Write some of them, rounded once, to the dtype of ``out``."""
        x = self.rows[:, columns]
        x = x[part] if self.places is None else x.index_select(0, self.places[part])
        return torch.add(self.shift[columns], x, alpha=self.scale, out=out)


def in_float64(points: Centred, kept: int, size: int) -> tuple[Float[Tensor, "k e"], Float[Tensor, "u"]]:
    """Return points x as ``(x, |x|^2, 1)``, and their lengths, both in float64.

    Args:
        points: The points.
        kept: How many are wanted, all or none; the lengths are wanted in any case.
        size: How many to look at together.
    """
    width, device = points.rows.shape[1], points.rows.device
    out = torch.empty(kept, width + 2, dtype=torch.float64, device=device)
    squares = torch.empty(len(points), dtype=torch.float64, device=device)
    scratch = torch.empty(min(size, len(points)), width, dtype=torch.float64, device=device)
    for start in range(0, len(points), size):
        part = slice(start, min(start + size, len(points)))
        x = points.write(part, slice(None), out[part, :width] if kept else scratch[: part.stop - start])
        squares[part] = x.square().sum(1)
    out[:, width], out[:, width + 1] = squares[:kept], 1
    return out, squares.sqrt_()


def exact_in_float64(parts: Iterable[Float[Tensor, "..."]], longest: float) -> bool:
    """Tell whether squared distances by products in float64 are exact, as those of integers are.

    Args:
        parts: All entries of the rows and of their origin, scaled by a power of two, looked at until some tell.
        longest: Length of the longest row from the origin.
    """
    if longest == 0:
        return False
    # All that is summed is a multiple of the square of this unit then, and at most (|x| + |y|)^2.
    unit = 2.0 ** (math.frexp(2 * longest)[1] - DIGITS // 2)
    return all(bool((part / unit == (part / unit).round()).all()) for part in parts)


def in_slices(rows: Centred, points: Centred, squares: Float[Tensor, "u"], out: Float[Tensor, "r u"]) -> None:
    """Write ``|y|^2 - 2 x.y``, the products in the dtype of ``out``, a slice of the columns after the other.

    Args:
        rows: The rows x.
        points: The points y.
        squares: ``|y|^2``.
        out: Where to.
    """
    width, size = rows.rows.shape[1], min(len(points), at_once(TILE, out.device))
    # One column more gives the squares.
    left = out.new_full((len(rows), width + 1), -0.5)
    rows.write(slice(None), slice(None), left[:, :width])
    rounded = out.new_empty(size, min(SLICE, width) + 1)
    for start, column in pairs_of(range(0, len(points), size), range(0, width, SLICE)):
        part, columns = slice(start, min(start + size, len(points))), slice(column, min(column + SLICE, width))
        last = columns.stop == width
        right = rounded[: part.stop - start, : columns.stop - column + last]
        points.write(part, columns, right[:, : columns.stop - column])
        if last:
            right[:, -1] = squares[part]
        out[:, part].addmm_(left[:, column : columns.stop + last], right.mT, beta=float(column > 0), alpha=-2)


def products_at(
    left: Float[Tensor, "r d"], right: Float[Tensor, "u d"], counts: Int[Tensor, "r"], columns: Int[Tensor, "m"]
) -> Float[Tensor, "m"]:
    """Return single entries of ``left right'``, so many of each row, without copies of the rows of ``right``."""
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    places = _sparse(starts, columns, left.new_zeros(len(columns)), (len(left), len(right)), left.device)
    return torch.sparse.sampled_addmm(places, left, right.mT, beta=0.0).values()


def _sparse(starts: Any, columns: Any, values: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    _announced()
    return torch.sparse_csr_tensor(starts, columns, values, shape, device=device, check_invariants=False)


@cache
def _announced() -> None:
    """Keep PyTorch from warning once that its class of such tensors may change: here it only says which entries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), device="cpu")
