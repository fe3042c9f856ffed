"""The hooks of a cache: what each direction captures, and how the capture stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tdprobe.contexts import Site
from tdprobe.errors import StateError
from tdprobe.hooks import (
    Hook,
    first_tensor,
    get_direction,
    keep,
    mirror_gradient,
    replace_first_tensor,
)
from tdprobe.hooks.gate import in_backward
from tdprobe.hooks.values import has_gradient, keep_attached
from tdprobe.stream.rows import token_rows

if TYPE_CHECKING:
    from tdprobe.latent.activation_caching import CachingContext


def capture_hook(
    context: CachingContext, module: nn.Module, site: Site, key: Any, callback: Callable[..., Any] | None
) -> Hook:
    """Return the hook that stores what ``module`` gives at ``site`` under ``key``."""
    direction = get_direction(site.direction)
    if direction.is_backward:
        return Hook(module, site.direction, _backward_hook(context, site, key, callback))
    if callback is not None or context.clause is not None:
        return Hook(module, site.direction, _computing_hook(context, site, key, callback))
    if direction.is_pre:
        return Hook(module, site.direction, _input_hook(context, site, key))
    # Keywords are asked for in any case: a module may hand back what it was given by name.
    return Hook(module, "fwd_kwargs", _output_hook(context, site, key))


def _output_hook(context: CachingContext, site: Site, key: Any) -> Callable[..., Any]:
    admits = context.gate.admits

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not admits() or in_backward():
            return None
        value = output if type(output) is Tensor else _tensor_of(output, site)
        kept, twin = keep_attached(value, args, kwargs)
        context.store(key, kept)
        context.fired(site)
        if twin is None:
            return None
        return twin if output is value else replace_first_tensor(output, twin)

    return hook


def _input_hook(context: CachingContext, site: Site, key: Any) -> Callable[..., None]:
    admits = context.gate.admits

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not admits() or in_backward():
            return
        _store(context, site, key, _tensor_of((args, kwargs), site))

    return hook


def _computing_hook(
    context: CachingContext, site: Site, key: Any, callback: Callable[..., Any] | None
) -> Callable[..., None]:
    direction, admits = get_direction(site.direction), context.gate.admits

    def hook(*passed: Any) -> None:
        if not admits() or in_backward():
            return
        named = direction.named_arguments(passed)
        if callback is not None:
            value = callback(**named, key=key, direction=site.direction)
        else:
            value = (passed[1], passed[2]) if direction.is_pre else named[direction.read]
        value = _tensor_of(value, site)
        if context.clause is not None:
            value = _selected(context, site, value)
            if not len(value):
                return
        _store(context, site, key, value)

    return hook


def _backward_hook(
    context: CachingContext, site: Site, key: Any, callback: Callable[..., Any] | None
) -> Callable[..., None]:
    direction, admits = get_direction(site.direction), context.gate.admits_backward

    def hook(*passed: Any) -> None:
        if not admits():
            return
        named = direction.named_arguments(passed)
        value = named[direction.read]
        if callback is not None:
            value = callback(**named, key=key, direction=site.direction)
        context.store(key, keep(_tensor_of(value, site)))
        context.fired(site)

    return hook


def _store(context: CachingContext, site: Site, key: Any, value: Any) -> None:
    """Keep a value as it is now; its gradient goes to what is kept too."""
    kept = keep(value)
    context.store(key, kept)
    if has_gradient(value):
        mirror_gradient(value, kept)
    context.fired(site)


def _selected(context: CachingContext, site: Site, value: Any) -> Tensor:
    call, clause = context.tracker.call if context.tracker else None, context.clause
    if call is None or clause is None:
        raise StateError(
            "tokens are selected by the inputs of the prepared model, and a module of it was called on its own; "
            "prepare that module instead, or drop tokens="
        )
    if not isinstance(value, Tensor):
        raise StateError(f"tokens are selected from a tensor, and {site.name!r} gave a {type(value).__name__}")
    # A mean is taken in float32 at least; what is cached has the dtype of the activation.
    return token_rows(site.name, value, clause.select(call)).to(value.dtype)


def _tensor_of(value: Any, site: Site) -> Any:
    found = first_tensor(value)
    if found is None:
        raise StateError(
            f"the {site.direction!r} value of {site.name!r} is a {type(value).__name__} without any tensor; "
            "pass a callback that returns the tensor to cache"
        )
    return found
