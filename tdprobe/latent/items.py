"""What comes with a batch besides the inputs of the model: labels, the type of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tensordict import LazyStackedTensorDict, NonTensorData, NonTensorStack, TensorDictBase
from torch import Tensor

from tdprobe._types import UnraveledKey
from tdprobe.errors import ConfigError, MissingKeyError, closest
from tdprobe.stream.tokens import Selection


def check_keys(keys: Sequence[Any] | None) -> tuple[Any, ...]:
    """Return the keys as a tuple.

    Raises:
        ConfigError: A key is no string and no flat tuple of strings.
    """
    keys = () if keys is None else (keys,) if isinstance(keys, str) else tuple(keys)
    for key in keys:
        if not isinstance(key, UnraveledKey):
            raise ConfigError(f"additional_keys holds strings or flat tuples of strings, got {key!r}")
    return keys


def top_names(keys: Sequence[Any]) -> frozenset[str]:
    """Return the names under which keys are found at the top of a TensorDict."""
    return frozenset(key if isinstance(key, str) else key[0] for key in keys)


def read_items(
    source: TensorDictBase | Mapping[str, Any], keys: Sequence[Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Take the items of a call out of its TensorDict, or its keywords.

    Args:
        source: What the call brought.
        keys: What is wanted; a nested key comes as a TensorDict under its first name.
        given: Items that were given by keyword; they come first.

    Raises:
        MissingKeyError: A key is in neither.
    """
    wanted = [key for key in keys if key not in given]
    missing = [key for key in wanted if (source.get(key, None) if isinstance(key, (str, tuple)) else None) is None]
    if missing:
        names = [key for key in source.keys() if isinstance(key, str)]
        near = closest(str(missing[0]), names)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise MissingKeyError(
            f"the input lacks {', '.join(map(repr, missing))}, which additional_keys names{hint} "
            f"(it has {', '.join(map(repr, names))})"
        )
    if not isinstance(source, TensorDictBase):
        return {name: source[name] for name in wanted} | dict(given)
    selected = source.select(*wanted)
    return {name: _plain(selected.get(name)) for name in selected.keys()} | dict(given)


def select_items(items: Mapping[str, Any], selection: Selection) -> dict[str, Any]:
    """Give every selected row its own items.

    Items with one entry per sample are repeated for each row of that sample; those of shape (batch, tokens,
    ...) are selected as the activations are. Whatever fits neither stays as it is.
    """
    return {name: _selected(value, selection) for name, value in items.items()}


def _selected(value: Any, selection: Selection) -> Any:
    batch, tokens = selection.shape
    if isinstance(value, (list, tuple)) and len(value) == batch:
        return [value[i] for i in selection.sample.tolist()]
    if not isinstance(value, (Tensor, np.ndarray)) or not value.ndim or value.shape[0] != batch:
        return value
    sample = selection.sample if isinstance(value, Tensor) else selection.sample.numpy()
    per_token = value.ndim > 1 and value.shape[1] == tokens > 1 and selection.averaged is None
    if not per_token:
        return value[sample.to(value.device) if isinstance(value, Tensor) else sample]
    flat = value.reshape(batch * tokens, *value.shape[2:])
    if selection.index is None:
        return flat
    return flat[selection.index.to(value.device) if isinstance(value, Tensor) else selection.index.cpu().numpy()]


def _plain(value: Any) -> Any:
    """Unwrap what a TensorDict holds besides tensors; equal strings of a stack are one string."""
    if isinstance(value, NonTensorData):
        return value.data
    if isinstance(value, (NonTensorStack, LazyStackedTensorDict)) and hasattr(value, "tolist"):
        found = value.tolist()
        flat = _flat(found)
        return flat[0] if flat and all(isinstance(x, str) and x == flat[0] for x in flat) else found
    return value


def _flat(value: Any) -> list[Any]:
    return [x for part in value for x in _flat(part)] if isinstance(value, list) else [value]
