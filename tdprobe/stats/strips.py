"""Products of columns, added to sums while they are in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.precision import at_once

# Columns whose products a CPU makes at a time.
STRIP = 128


def plus_product(
    old: Float[Tensor, "*lead d e"],
    x: Float[Tensor, "*lead n d"],
    y: Float[Tensor, "*lead n e"],
    out: Tensor | None = None,
) -> Float[Tensor, "*lead d e"]:
    """Return ``old + x' y``, a strip of rows at a time.

    Of a tensor with itself only what is right of a strip's first diagonal element is computed.

    Args:
        old: The sum so far, left as it is unless it is ``out`` as well.
        x: One layer.
        y: The same tensor, or another one.
        out: Where to put the result, new memory by default.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> plus_product(torch.ones(2, 2), x, x).tolist()
        [[2.0, 3.0], [3.0, 5.0]]
    """
    out = torch.empty_like(old) if out is None else out
    width, strip = x.shape[-1], at_once(STRIP, x.device)
    if width <= strip:
        return torch.add(old, x.mT @ y, out=out)
    for start in range(0, width, strip):
        end, first = start + strip, start if x is y else 0
        product = x[..., start:end].mT @ y[..., first:]
        torch.add(old[..., start:end, first:], product, out=out[..., start:end, first:])
        if x is y:
            out[..., end:, start:end] = out[..., start:end, end:].mT
    return out
