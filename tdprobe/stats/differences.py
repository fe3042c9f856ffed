"""Distances of single pairs of rows, summed from differences."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Float, Int


def differences_at(
    rows: Float[Tensor, "n d"], pairs: tuple[Int[Tensor, "m"], Int[Tensor, "m"]], p: float, scale: float, size: int
) -> Float[Tensor, "m"]:
    """Return measures of pairs of rows in float64: squares of scaled distances for p = 2, else distances.

    Args:
        rows: The rows as they were given.
        pairs: Places of the first and of the second row of each pair.
        p: Order of the norm.
        scale: A power of two, used for p = 2 only.
        size: Pairs to look at together.
    """
    wide = rows.dtype == torch.float64
    out = torch.empty(len(pairs[0]), dtype=torch.float64, device=rows.device)
    for start in range(0, len(out), size):
        part = slice(start, start + size)
        left, right = (places[part] for places in pairs)
        gap = rows.index_select(0, left).double()
        gap.sub_(rows.index_select(0, right))
        # Only numbers beyond float32 may leave float64 when squared.
        gap = gap.mul_(scale) if wide else gap
        out[part] = torch.linalg.vector_norm(gap, p, dim=1)
    if p != 2:
        return out
    return out.square_() if wide else out.mul_(scale).square_()
