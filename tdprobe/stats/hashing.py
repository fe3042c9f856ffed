"""A 64-bit hash that is the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Int


def _shift(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; masking the sign bits makes it the logical shift of the definition.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    """Scramble int64 numbers one to one (the splitmix64 finalizer; Steele, Lea and Flood 2014)."""
    x = x.to(torch.int64) + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)
