"""Gram matrices of layers, a tile at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.precision import at_once
from tdprobe.stats.together import stacked

# Rows of a tile: enough for the product to run at full speed, and few enough to skip the lower triangle.
BLOCK = 128


class Layers:
    """Hold the rows of one layer, or of several of one shape, with what centres them: no centred copy is ever made.

    Args:
        rows: By layer, ``(n, d)``.
        dtype: To compute in.

    Attributes:
        rows: As given.
        spread: Sum of squared distances to the mean, float64, ``()`` of one layer and ``(l,)`` of several.
        power: Sum of squared norms, alike.
    """

    def __init__(self, rows: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.rows, n, x = rows, rows[0].shape[0], _all(rows)
        # The column means in two steps (see `state.centre`).
        self._coarse = coarse = x.mean(-2, keepdim=True, dtype=dtype)
        self._rest = rest = torch.zeros_like(coarse)
        squares = []
        for part in x.split(at_once(4 * BLOCK, x.device), -2):
            y = part - coarse
            rest += y.sum(-2, keepdim=True)
            squares.append(torch.linalg.vector_norm(y, dim=(-2, -1)).double() ** 2)
        rest /= n
        wide = rest.double()
        self.spread = (sum(squares) - n * wide.square().sum((-2, -1))).clamp(min=0)
        self.power = self.spread + n * (coarse.double() + wide).square().sum((-2, -1))

    def gram(
        self, left: slice, right: slice, factor: float | Tensor, memory: Sequence[Tensor], out: Float[Tensor, "l r c"]
    ) -> None:
        """Write a tile of each layer, times a factor.

        Args:
            left: Rows of the tile.
            right: Columns of the tile.
            factor: What `factors_of` gives.
            memory: Room for so many rows of one layer as the tile has rows, and columns.
            out: Where to write.
        """
        a, b = (self._centred(part, room) for part, room in zip((left, right), memory, strict=True))
        if isinstance(factor, Tensor):
            torch.bmm(a, b.mT, out=out).mul_(factor)
        else:
            out[0].addmm_(a, b.mT, beta=0, alpha=factor)

    def _centred(self, part: slice, memory: Tensor) -> Tensor:
        if len(self.rows) > 1:
            return _all([rows[part] for rows in self.rows]).sub(self._coarse).sub_(self._rest)
        x = self.rows[0][part]
        return torch.sub(x, self._coarse, out=memory[: len(x), : x.shape[1]]).sub_(self._rest)


def factors_of(scale: Sequence[Tensor], dtype: torch.dtype) -> list[float | Tensor]:
    """Return a number for a layer that is alone, and a tensor for several: a GPU stops for numbers, so once at most."""
    numbers = iter(torch.cat([x for x in scale if len(x) == 1] or [scale[0][:0]]).tolist())
    return [next(numbers) if len(x) == 1 else x.to(dtype).view(-1, 1, 1) for x in scale]


def _all(rows: Sequence[Tensor]) -> Tensor:
    return stacked(rows, range(len(rows)))
