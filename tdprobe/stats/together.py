"""Layers of one shape worked on together: for a GPU, starting a step takes longer than doing it for one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Bytes that copies of the layers of a group may take.
ROOM = 2**28


def room(device: torch.device) -> int:
    """Return how many bytes to spend on copies so that layers go together; none where a copy saves no time."""
    return 0 if device.type == "cpu" else ROOM


def together(layers: Iterable[Tensor], nbytes: Callable[[Tensor], float]) -> list[list[int]]:
    """Group the places of layers of one shape, dtype and device; on the CPU every layer is alone.

    Args:
        layers: The layers.
        nbytes: Say how many bytes the copies of a layer take while its group is worked on.

    Example:
        >>> together([torch.ones(2, 3), torch.ones(2, 3)], Tensor.numel)
        [[0], [1]]
    """
    groups: list[list[int]] = []
    last: dict[Any, list[int]] = {}
    for place, x in enumerate(layers):
        kind = x.shape, x.dtype, x.device
        if kind not in last or (len(last[kind]) + 1) * nbytes(x) >= room(x.device):
            last[kind] = []
            groups.append(last[kind])
        last[kind].append(place)
    return groups


def stacked(layers: Sequence[Tensor], group: Sequence[int]) -> Tensor:
    """Return the layers of a group along a new first dimension; a single one as it is."""
    return layers[group[0]] if len(group) == 1 else torch.stack([layers[place] for place in group])


def apart(x: Tensor, group: Sequence[int]) -> Sequence[Tensor]:
    """Return the layers of what `stacked` gave, or of what was made of it."""
    return [x] if len(group) == 1 else x.unbind()


def each_layer(
    step: Callable[..., tuple[Tensor, ...]], nbytes: Callable[[Tensor], int], *layers: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], ...]:
    """Call a step for every layer, and once for those of a group.

    Args:
        step: Takes one tensor of each of ``layers``, with any leading dimensions, and returns tensors with the same.
        nbytes: See `together`; it is asked for the first of ``layers``.
        *layers: Tensors by layer, as many of each.

    Returns:
        What the step returned, by layer.
    """
    found: dict[int, tuple[Tensor, ...]] = {}
    for group in together(layers[0], nbytes):
        parts = step(*(stacked(kind, group) for kind in layers))
        found |= zip(group, zip(*(apart(x, group) for x in parts), strict=True), strict=True)
    return tuple(zip(*(found[place] for place in sorted(found)), strict=True))
