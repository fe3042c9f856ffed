"""Where to put the origin, so that products of centred rows round little."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdprobe._types import Float


def centre_of_most(parts: Sequence[Tensor]) -> tuple[Float[Tensor, "d"], float]:
    """Return the mean of the half of the rows that is nearest to the mean of all, and a bound on entries from it.

    A few rows of huge norm, such as first tokens, pull the mean far away from all others, whose products would
    round at the scale of that way.

    Args:
        parts: The rows, as many at a time as are to be looked at together.
    """
    mean = sum(part.double().sum(0) for part in parts) / sum(map(len, parts))
    far = torch.cat([(part.double() - mean).abs().amax(1) for part in parts])
    near = (far <= far.median()).double()
    middle = sum(some @ part.double() for some, part in zip(near.split(len(parts[0])), parts, strict=True))
    # On a grid of a thousandth of its reach, products of rows of few digits, such as integers, stay exact.
    grid = 2.0 ** max(-1000, math.frexp(float(far.median() or far.max()))[1] - 10)
    steps = middle / near.sum() / grid
    middle = torch.where(steps.abs() < 2**52, steps.round(), steps) * grid
    return middle, float(far.max() + (middle - mean).abs().max())
