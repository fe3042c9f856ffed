"""Selecting and sorting rows of numbers, on the CPU by NumPy's vectorised routines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from timeit import repeat

import numpy as np
import torch
from torch import Tensor

from tdprobe._types import Float, Int

# Columns that share a minimum, and numbers for each wanted one below which minima save nothing.
GROUP, FEW = 8, 4
# What sorting is measured with, how often, and the share of bounds that are compared after sorting too.
TRIAL, TURNS, COMPARED_ANYWAY = (32, 4096), 5, 1 / 3
# Bounds of each row from which on a GPU sorts.
GPU_BOUNDS = 8.0


def distinct_rows(rows: Float[Tensor, "n d"]) -> tuple[Int[Tensor, "n"], Int[Tensor, "u"], Int[Tensor, "u"]]:
    """Tell equal rows: return the number of each, and by numbers, in the order they come, the first row and how many.

    Example:
        >>> [x.tolist() for x in distinct_rows(torch.tensor([[7.0], [5.0], [7.0]]))]
        [[0, 1, 0], [0, 1], [2, 1]]
    """
    stands_for = torch.arange(len(rows), device=rows.device)
    # Only rows that begin alike can be equal, as a rule a few: comparing all columns of all rows takes its time.
    _, place, counts = rows[:, 0].unique(return_inverse=True, return_counts=True)
    alike = (counts[place] > 1).nonzero().squeeze(1)
    _, kind = torch.unique(rows[alike], dim=0, return_inverse=True)
    first = torch.empty_like(alike).scatter_reduce_(0, kind, alike, "amin", include_self=False)
    stands_for[alike] = first[kind]
    first, number, counts = stands_for.unique(return_inverse=True, return_counts=True)
    return number, first, counts


def smallest(block: Float[Tensor, "r u"], k: int) -> tuple[Float[Tensor, "r m"], Int[Tensor, "r m"]]:
    """Return the k smallest numbers of each row, ascending, and their places, without sorting the row."""
    k = min(k, block.shape[1])
    values, places = _few(block, k)
    order = ascending(values)
    return values.gather(1, order), places.gather(1, order)


def _few(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest numbers of each row, in any order, and their places."""
    columns = block.shape[1]
    size = min(GROUP, columns // (FEW * k)) if k else 0
    if size < 2:
        places = _places_of_smallest(block, k)
        return block.gather(1, places), places
    groups = columns // size
    # The k smallest numbers lie in the k groups with the smallest minima.
    _, chosen = _few(block[:, : size * groups].unflatten(1, (size, groups)).amin(1), k)
    steps = groups * torch.arange(size, device=block.device)
    members = (chosen.unsqueeze(-1) + steps).flatten(1)
    if size * groups < columns:
        rest = torch.arange(size * groups, columns, device=block.device)
        members = torch.cat([members, rest.expand(len(block), -1)], 1)
    values = block.gather(1, members)
    places = _places_of_smallest(values, k)
    return values.gather(1, places), members.gather(1, places)


def _places_of_smallest(values: Tensor, k: int) -> Tensor:
    if values.device.type != "cpu":
        return values.topk(k, largest=False, sorted=False).indices
    # Vectorised selection, which torch does not have on the CPU: a fifth of the time of topk.
    return torch.from_numpy(np.argpartition(values.numpy(), k - 1, axis=1)[:, :k])


def sort_in_place(values: Float[Tensor, "r m"]) -> Float[Tensor, "r m"]:
    """Sort each row, without the places of its numbers; NaN may be anywhere."""
    if values.device.type != "cpu":
        return values.copy_(values.sort(1).values)
    values.numpy().sort(axis=1)
    return values


def ascending(values: Float[Tensor, "r m"]) -> Int[Tensor, "r m"]:
    """Return the places that sort each row; NaN may be anywhere."""
    if values.device.type != "cpu":
        return values.argsort(1)
    if values.dtype != torch.float32:
        return torch.from_numpy(np.argsort(values.numpy(), axis=1))
    # Sorting pairs of key and place takes half the time of sorting places by their keys. The bits of a float are in the
    # order of its values once those of negative numbers are turned round.
    bits = values.contiguous().view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << 32
    keys |= torch.arange(values.shape[1], device="cpu")
    keys.numpy().sort(axis=1)
    return keys & 0xFFFFFFFF


@cache
def sorting_pays_from(device: torch.device) -> float:
    """Return how many bounds a row must have for sorting the row to take less time than comparing it with each.

    It is measured, once: processors differ by a factor of five. What is found is the same either way.
    """
    if device.type != "cpu":
        return GPU_BOUNDS
    block, bound = torch.rand(TRIAL, generator=torch.Generator().manual_seed(0)), torch.full(TRIAL[:1], 0.5)
    compare, sort = (
        min(repeat(run, number=1, repeat=TURNS))
        for run in (lambda: parted(block, bound, bound).below, lambda: sort_in_place(block.clone()))
    )
    # With numbers close to it, a bound is compared after all.
    return sort / compare / (1 - COMPARED_ANYWAY)


@dataclass
class Parted:
    """Tell numbers below a bound from those up to another.

    Attributes:
        mask: Which numbers of each row are below the lower bound, ``(r, u)`` bool.
        row: With ``place``: which numbers lie between the bounds, or on one.
        place: Their columns.
        words: Of ``mask``, where eight marks are one word.
    """

    mask: Tensor
    row: Tensor
    place: Tensor
    words: Tensor | None = None

    @property
    def below(self) -> Int[Tensor, "r"]:
        """Count the numbers of each row that are below the lower bound."""
        if self.words is None:
            return self.mask.sum(1)
        # Words are added in parts that are so short that no byte of their sum runs over.
        return sum(part.sum(1, keepdim=True).view(torch.uint8).sum(1) for part in self.words.split(255, dim=1))


def parted(block: Float[Tensor, "r u"], low: Float[Tensor, "r"], high: Float[Tensor, "r"]) -> Parted:
    """Compare the numbers of each row with two bounds, the lower one first."""
    low, high = low.unsqueeze(1), high.unsqueeze(1)
    if block.device.type != "cpu":
        mask = block < low
        return Parted(mask, *(mask ^ (block <= high)).nonzero().unbind(1))
    below, upto = _marks(np.less, block, low.numpy()), _marks(np.less_equal, block, high.numpy())
    return Parted(below.view(torch.bool)[:, : block.shape[1]], *_marked(below ^ upto), below)


def _marks(compare: np.ufunc, block: Tensor, bound: np.ndarray) -> Int[Tensor, "r w"]:
    """Compare each row with a bound; eight marks, of a byte each, are one word."""
    rows, columns = block.shape
    marks = np.empty((rows, -(-columns // 8) * 8), dtype=np.bool_)
    marks[:, columns:] = False
    compare(block.numpy(), bound, out=marks[:, :columns])
    return torch.from_numpy(marks.view(np.int64))


def _marked(words: Int[Tensor, "r w"]) -> tuple[Int[Tensor, "t"], Int[Tensor, "t"]]:
    """Return rows and columns of the marks that are set."""
    row, word = words.nonzero().unbind(1)
    found, byte = words[row, word].unsqueeze(1).view(torch.bool).nonzero().unbind(1)
    return row[found], 8 * word[found] + byte
