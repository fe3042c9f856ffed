"""What flows through a hook: finding the tensor, putting one back, keeping one safely."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdprobe.errors import ConfigError


def first_tensor(value: Any) -> Tensor | TensorDictBase | None:
    """Return the tensor that stands for ``value``.

    The rule: a tensor or TensorDict is itself; a tuple, list, mapping, ``ModelOutput`` or dataclass gives the
    first tensor in its own order, looking inside nested tuples and lists before going on. ``None`` if there is none.

    Example:
        >>> first_tensor((None, (torch.ones(2), torch.zeros(2))))
        tensor([1., 1.])
    """
    if isinstance(value, (Tensor, TensorDictBase)):
        return value
    for item in _items(value):
        found = first_tensor(item)
        if found is not None:
            return found
    return None


def replace_first_tensor(value: Any, new: Tensor) -> Any:
    """Rebuild ``value`` with its first tensor replaced; everything else is the same object as before.

    Args:
        value: Tensor, tuple, named tuple, list, mapping, ``ModelOutput`` or dataclass.
        new: Tensor of the same shape, dtype and device.

    Raises:
        ConfigError: ``value`` holds no tensor, or the shapes differ.
    """
    old = first_tensor(value)
    if old is None:
        raise ConfigError(f"there is no tensor to replace in a {type(value).__name__}")
    if old.shape != new.shape:
        raise ConfigError(
            f"the new value has shape {tuple(new.shape)}, the module gave {tuple(old.shape)}; both must "
            "agree. Where only the lengths of texts differ, tokens= picks tokens that both have"
        )
    return _replace(value, old, new)


def _items(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return ()


def _replace(value: Any, old: Any, new: Any) -> Any:
    if value is old:
        return new
    if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
        return _replace_field(value, old, new)
    if not isinstance(value, (tuple, list)):
        return value
    items = list(value)
    for position, item in enumerate(items):
        replaced = _replace(item, old, new)
        if replaced is not item:
            items[position] = replaced
            break
    else:
        return value
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _replace_field(value: Any, old: Any, new: Any) -> Any:
    # A ModelOutput is a mapping and a dataclass at once; written as a mapping, it keeps both in step.
    is_mapping = isinstance(value, Mapping)
    names = list(value) if is_mapping else [f.name for f in dataclasses.fields(value)]
    for name in names:
        item = value[name] if is_mapping else getattr(value, name)
        replaced = _replace(item, old, new)
        if replaced is item:
            continue
        # A copy, because constructors need not take their fields: defaultdict, init=False, frozen classes.
        twin = copy.copy(value)
        if is_mapping:
            twin[name] = replaced
        else:
            object.__setattr__(twin, name, replaced)
        return twin
    return value


def lazy_copy(tensor: Tensor) -> Tensor:
    """Copy ``tensor`` so that a later in-place write to either side never shows on the other.

    The copy is made by the first writer (copy on write), so nothing is paid where nobody writes, and gradients
    flow through it. Tensors that cannot share storage that way are copied at once.
    """
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return tensor.clone()
    if tensor.is_inference():
        return _ordinary_clone(tensor)
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:
        return tensor.clone()


def _ordinary_clone(tensor: Tensor) -> Tensor:
    # Tensors made under inference_mode can never be saved for backward; what is kept must be able to.
    with torch.inference_mode(False) if tensor.is_inference() else nullcontext():
        return tensor.clone()


def compact(tensor: Tensor) -> Tensor:
    """Copy a slice that would keep a much larger storage alive; return any other tensor unchanged."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_nested:
        return tensor
    used = tensor.numel() * tensor.element_size()
    return _ordinary_clone(tensor) if 2 * used < tensor.untyped_storage().nbytes() else tensor


def keep(tensor: Any) -> Any:
    """Make a tensor or TensorDict safe to keep after the hook returns.

    In-place writes elsewhere do not reach it, and it pins no large storage.
    """
    if not isinstance(tensor, Tensor):
        return tensor.clone()
    small = compact(tensor)
    return lazy_copy(tensor) if small is tensor else small


def has_gradient(value: Any) -> bool:
    """Tell whether gradients are being recorded for ``value``."""
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def keep_attached(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor | None]:
    """Keep a module's output so that gradients reach what is kept.

    Args:
        value: The output.
        args: What the module was given by position.
        kwargs: What it was given by name.

    Returns:
        What is kept, and the twin that the model must go on with for gradients to pass through what is kept; ``None``:
        it goes on with ``value``.
    """
    kept = keep(value)
    if not has_gradient(value):
        return kept, None
    if _is_given(value, args, kwargs) or not _laid_out_alike(kept, value):
        mirror_gradient(value, kept)
        return kept, None
    # Gradients reach what is kept only if the model goes on from it.
    return kept, lazy_copy(kept)


def _is_given(value: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a module hands back (a view of) its input, or a parameter, which others may write to."""
    base = value._base if value._is_view() else value
    given = (*args, *kwargs.values())
    return value.is_leaf or any(
        arg is base or (arg._is_view() and arg._base is base) for arg in given if isinstance(arg, Tensor)
    )


def _laid_out_alike(kept: Tensor, value: Tensor) -> bool:
    """Tell whether the model can go on from ``kept`` and compute the same bits."""
    return value.layout is torch.strided and not value.is_nested and kept.stride() == value.stride()


def mirror_gradient(value: Tensor, kept: Tensor) -> None:
    """Let ``kept.retain_grad()`` see the gradient of ``value``, of which it is a copy off the path of the model.

    Nothing stays on ``value`` once ``kept`` is dropped.
    """
    own: list[Tensor] = []
    kept.register_hook(own.append)
    alive = weakref.ref(kept, lambda _: handle.remove())

    def relay(gradient: Tensor) -> None:
        # What came through kept itself is part of the gradient, and kept has counted it already.
        rest = gradient - own.pop() if own else gradient
        copy_of_value = alive()
        if copy_of_value is not None and copy_of_value.retains_grad:
            seen = copy_of_value.grad
            copy_of_value.grad = rest.clone() if seen is None else seen + rest

    handle = value.register_hook(relay)
