"""How many points lie within given distances: counted a block at a time, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.stats.distances import TIE, Space
from tdprobe.stats.precision import at_once

BLOCK = 128


def count_within(x: Float[Tensor, "n d"], rows: Int[Tensor, "r"], radii: Float[Tensor, "c"]) -> Float[Tensor, "r c"]:
    """Count the distinct rows that are nearer than some distances, themselves and their copies left out.

    Args:
        x: All rows.
        rows: Places of the rows to count for.
        radii: Distances; a row at exactly one of them is not within it.

    Returns:
        The counts, float64.
    """
    if len(rows) == 0:
        return torch.zeros(0, len(radii), dtype=torch.float64, device=x.device)
    space = Space(x)
    size = at_once(BLOCK, x.device)
    memory = torch.empty(size, space.points, dtype=space.dtype, device=x.device)
    reach = torch.tensor([space.measure(radius) for radius in radii.tolist()], dtype=torch.float64, device=x.device)
    found = []
    for part in rows.split(size):
        block = space.block(part, out=memory[: len(part)])
        found.append(torch.stack([_nearer(space, part, block, target) for target in reach], 1))
    return torch.cat(found)


def _nearer(space: Space, rows: Tensor, block: Tensor, target: Tensor) -> Float[Tensor, "r"]:
    targets = target.expand(len(rows))
    slack, seen = space.slack(rows, targets, space.dtype), targets - space.offset(rows, space.dtype)
    low, high = ((seen + sign * slack).to(block.dtype).unsqueeze(1) for sign in (-1, 1))
    surely = (block < low).sum(1).double()
    row, point = ((block >= low) & (block <= high)).nonzero().unbind(1)
    nearer = space.exact(rows[row], point) < target * (1 - TIE)
    return surely.index_add_(0, row, nearer.double())
