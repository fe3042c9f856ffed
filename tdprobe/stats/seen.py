"""Measures of some rows to all points, and how far they may be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdprobe._types import Int
from tdprobe.stats.distances import Space
from tdprobe.stats.order import smallest
from tdprobe.stats.precision import at_once

# Most rows in a block, and bytes for all blocks that are needed at once.
BLOCK, BUDGET = 512, 256 * 2**20


@dataclass
class Seen:
    """Say how far points are from some rows, up to a slack.

    Attributes:
        space: The layer.
        rows: Places of the rows.
        block: Measures to all points, ``(r, u)``, but for the offset.
        offset: What the block lacks, ``(r,)`` float64.
        dtype: What the products were computed in.
        near: The smallest numbers of each row of the block, ascending, ``(r, k)``.
        points: Which points those are of.
    """

    space: Space
    rows: Tensor
    block: Tensor
    offset: Tensor
    dtype: torch.dtype
    near: Tensor
    points: Tensor

    @classmethod
    def of(cls, space: Space, rows: Int[Tensor, "r"], block: Tensor, few: int) -> Seen:
        """Take a block of products.

        Args:
            space: The layer.
            rows: Places of the rows.
            block: ``space.block(rows)``.
            few: How many of the nearest points of each row to list.
        """
        return cls(space, rows, block, space.offset(rows, block.dtype), block.dtype, *smallest(block, few))

    def rounded(self, out: Tensor) -> Seen:
        """Keep measures in another dtype, the memory given."""
        return replace(self, block=out.copy_(self.block), near=self.near.to(out.dtype))

    def some(self, places: Tensor) -> Seen:
        """Take some of the rows."""
        parts = ("rows", "block", "offset", "near", "points")
        return replace(self, **{name: getattr(self, name)[places] for name in parts})

    @property
    def _relative(self) -> float:
        # Numbers of the product's own dtype are rounded no further.
        return 0.0 if self.block.dtype == self.dtype else torch.finfo(self.block.dtype).eps

    def ceiling(self, measure: Tensor, point: Tensor) -> Tensor:
        """Return upper bounds of exact measures, given those seen, ``(r, k)``."""
        return self.space.ceiling(self.rows, measure * (1 + self._relative), point, self.dtype) + self._least

    def slack(self, reach: Tensor) -> Tensor:
        """Bound how far measures within a reach may be off, as `Space.slack` does."""
        return self.space.slack(self.rows, reach, self.dtype) + self._relative * reach + self._least

    @property
    def _least(self) -> float:
        return torch.finfo(self.block.dtype).tiny if self._relative else 0.0


class Memory:
    """Hold blocks of rows: fresh memory for each would cost as much as the products in it.

    Args:
        spaces: The layers.
        all_layers: Keep the blocks of all layers at once, what is known in float64 as float32.

    Attributes:
        size: Rows in a block.
    """

    def __init__(self, spaces: Mapping[int, Space], all_layers: bool) -> None:
        self.spaces = spaces
        some = next(iter(spaces.values()))
        widest, total = (of(space.points for space in spaces.values()) for of in (max, sum))
        each = all_layers * (4 if some.p == 2 else 8)
        block, budget = (at_once(number, some.rows.device, 4) for number in (BLOCK, BUDGET))
        self.size = max(16, min(block, budget // (8 * widest + each * total)))
        once = torch.empty(self.size * widest, dtype=torch.float64, device=some.rows.device)
        self._once, self._held = once, {}
        if all_layers and some.p == 2:
            self._held = {i: once.new_empty(self.size, x.points, dtype=torch.float32) for i, x in spaces.items()}

    def of(self, layer: int, rows: int) -> Tensor:
        """Return memory for a block of some rows of a layer, which others share if nothing has to be kept."""
        space = self.spaces[layer]
        if space.dtype == torch.float32 and self._held:
            return self._held[layer][:rows]
        return self._once.view(space.dtype)[: rows * space.points].view(rows, space.points)

    def keep(self, layer: int, seen: Seen) -> Seen:
        """Keep what was seen until another block of this layer comes."""
        # Other norms have blocks of their own, and numbers that may leave float32.
        if seen.dtype == torch.float32 or self.spaces[layer].p != 2:
            return seen
        return seen.rounded(self._held[layer][: len(seen.rows)])
