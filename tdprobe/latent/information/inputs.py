"""What the entropy functions take: shapes, masks, dtypes, and where they write the parts of a loss."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdprobe.errors import ConfigError, unknown

Losses = MutableMapping[str, Tensor] | TensorDictBase | None

PAIR_SHAPE = "(batch, tokens, features)"


def widened(*tensors: Tensor) -> list[Tensor]:
    """Return real tensors in the dtype they have in common, float32 at least.

    Raises:
        ConfigError: One of them is complex or no tensor at all.
    """
    dtype = torch.float32
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(f"embeddings, means and stds are real tensors, got {got}")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def check_components(clean: Tensor, others: Mapping[str, Tensor], name: str) -> None:
    """Refuse embeddings that are not three-dimensional, and what has not exactly their shape.

    Args:
        clean: (batch, tokens, features).
        others: By the name of the argument.
        name: Name of the argument ``clean``.

    Raises:
        ConfigError: A shape is wrong.
    """
    if clean.ndim != 3:
        raise ConfigError(f"{name} has shape {tuple(clean.shape)}; it must be {PAIR_SHAPE}")
    for other, tensor in others.items():
        if tensor.shape != clean.shape:
            raise ConfigError(
                f"{other} has shape {tuple(tensor.shape)} and {name} {tuple(clean.shape)}; they must be the same "
                f"{PAIR_SHAPE}; use .expand_as() for values that several positions share"
            )


def kept(mask: Tensor, shape: tuple[int, ...], name: str, *more: tuple[int, ...]) -> Tensor:
    """Return a mask as bool: nonzero means keep.

    Args:
        mask: Bool, int or float.
        shape: What it must be.
        name: Name of the argument.
        more: Other shapes that will do.

    Raises:
        ConfigError: It has another shape.
    """
    if not isinstance(mask, Tensor):
        raise ConfigError(f"{name} is a tensor in which nonzero means keep, got {type(mask).__name__}")
    if tuple(mask.shape) not in (shape, *more):
        allowed = " or ".join(map(str, (shape, *more)))
        raise ConfigError(f"{name} has shape {tuple(mask.shape)}; for these embeddings it must be {allowed}")
    return mask != 0


def check_choice(name: str, got: Any, allowed: tuple[str, ...]) -> None:
    """Refuse an option that does not exist.

    Raises:
        ConfigError: It is not among the allowed ones.
    """
    if got not in allowed:
        raise ConfigError(unknown(name, str(got), allowed))


def write_losses(losses: Losses, parts: Mapping[str, Tensor]) -> None:
    """Write scalars into the caller's mapping, over what is there, with their graph.

    Raises:
        ConfigError: The mapping cannot hold scalars.
    """
    if losses is None:
        return
    if not isinstance(losses, (MutableMapping, TensorDictBase)):
        raise ConfigError(f"losses is a dict or TensorDict to write into, got {type(losses).__name__}")
    if isinstance(losses, TensorDictBase) and losses.batch_size:
        raise ConfigError(
            f"losses has batch_size {tuple(losses.batch_size)}, and scalars have no batch dimension; give "
            "TensorDict() or a dict"
        )
    for name, value in parts.items():
        losses[name] = value
