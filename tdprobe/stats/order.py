"""Selecting and sorting rows of numbers, on the CPU by NumPy's vectorised routines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdprobe._types import Float, Int

# Columns that share a minimum, and numbers for each wanted one below which minima save nothing.
GROUP, FEW = 8, 4


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


def in_order(values: Float[Tensor, "r m"]) -> Float[Tensor, "r m"]:
    """Return each row sorted, without the places of its numbers; NaN may be anywhere."""
    if values.device.type != "cpu":
        return values.sort(1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


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


@dataclass
class Parted:
    """Tell numbers below a bound from those up to another.

    Attributes:
        mask: Which numbers of each row are below the lower bound, ``(r, u)`` bool.
        below: How many those are, ``(r,)`` int64.
        row: With ``place``: which numbers lie between the bounds, or on one.
        place: Their columns.
    """

    mask: Tensor
    below: Tensor
    row: Tensor
    place: Tensor


def parted(block: Float[Tensor, "r u"], low: Float[Tensor, "r"], high: Float[Tensor, "r"]) -> Parted:
    """Compare the numbers of each row with two bounds, the lower one first."""
    low, high = low.unsqueeze(1), high.unsqueeze(1)
    if block.device.type != "cpu":
        mask = block < low
        return Parted(mask, mask.sum(1), *(mask ^ (block <= high)).nonzero().unbind(1))
    below, upto = _marks(np.less, block, low.numpy()), _marks(np.less_equal, block, high.numpy())
    # Words are added in parts that are so short that no byte of their sum runs over.
    count = sum(part.sum(1, keepdim=True).view(torch.uint8).sum(1) for part in below.split(255, dim=1))
    return Parted(below.view(torch.bool)[:, : block.shape[1]], count, *_marked(below ^ upto))


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
