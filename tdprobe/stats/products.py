"""Products of rows with points: of all in float32, by slices, and of single pairs in float64."""

from __future__ import annotations

import warnings
from functools import cache
from itertools import product as pairs_of
from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.stats.precision import at_once

# Columns of one product and of one tile: short sums round less, and a tile stays in the cache meanwhile.
SLICE, TILE = 128, 2048


def in_slices(
    rows: Float[Tensor, "r d"], points: Float[Tensor, "u d"], squares: Float[Tensor, "u"], out: Float[Tensor, "r u"]
) -> None:
    """Write ``|y|^2 - 2 x.y``, the products in the dtype of ``out``, a slice of the columns after the other.

    Args:
        rows: The rows x.
        points: The points y. Where they have another dtype, they are rounded when their turn comes.
        squares: ``|y|^2``.
        out: Where to.
    """
    width, size = rows.shape[1], min(len(points), at_once(TILE, out.device))
    rows, squares = rows.to(out.dtype), squares.to(out.dtype)
    rounded = out.new_empty(size, min(SLICE, width))
    for start, column in pairs_of(range(0, len(points), size), range(0, width, SLICE)):
        part = points[start : start + size, column : column + SLICE]
        tile, right = out[:, start : start + size], rounded[: len(part), : part.shape[1]].copy_(part)
        if column == 0:
            tile.copy_(squares[start : start + size].expand_as(tile))
        tile.addmm_(rows[:, column : column + SLICE], right.mT, alpha=-2)


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
