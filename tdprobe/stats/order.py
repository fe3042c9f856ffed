"""Selecting and sorting rows of numbers, on the CPU by NumPy's vectorised routines."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tdprobe._types import Float, Int


def smallest(block: Float[Tensor, "r u"], k: int) -> tuple[Float[Tensor, "r m"], Int[Tensor, "r m"]]:
    """Return the k smallest numbers of each row and their places, in any order, without sorting the row.

    The k smallest numbers lie in the k groups of columns with the smallest minima, which cost one pass.
    """
    columns = block.shape[1]
    k = min(k, columns)
    size = min(24, int((columns / k) ** 0.5))
    if size < 2:
        places = _places_of_smallest(block, k)
        return block.gather(1, places), places
    groups = columns // size
    chosen = _places_of_smallest(block[:, : size * groups].unflatten(1, (size, groups)).amin(1), k)
    steps = groups * torch.arange(size, device=block.device)
    rest = torch.arange(size * groups, columns, device=block.device).expand(len(block), -1)
    members = torch.cat([(chosen.unsqueeze(-1) + steps).flatten(1), rest], 1)
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
    keys |= torch.arange(values.shape[1])
    keys.numpy().sort(axis=1)
    return keys & 0xFFFFFFFF
