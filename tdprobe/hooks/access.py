"""Read, write and stop at single modules, by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdprobe.errors import ConfigError, StateError
from tdprobe.hooks.direction import check_callback, get_direction
from tdprobe.hooks.gate import in_backward
from tdprobe.hooks.handles import AddedHook, EarlyStop, Hook
from tdprobe.hooks.paths import resolve_path
from tdprobe.hooks.values import first_tensor, keep, keep_attached, replace_first_tensor

WHAT = {"fwd": "output", "fwd_pre": "input", "bwd": "grad_input", "bwd_pre": "grad_output"}


class CacheProxy:
    """Stand for a value that a hook will store.

    Args:
        key: Its key.
        cache: Where it will be.
    """

    def __init__(self, key: Any, cache: TensorDictBase) -> None:
        self._key = key
        self._cache = cache

    def resolve(self) -> Any:
        """Return the value.

        Raises:
            StateError: It has not been stored yet.
        """
        found = self._cache.get(self._key, None)
        if found is None:
            raise StateError(f"nothing has been stored under {self._key!r} yet; run the model first")
        return found


class ModuleAccess:
    """Let a hooked module read, write and stop at single modules, until the block ends or the handle is removed.

    Paths start at the user's model, or with ``relative=False`` at the hooked module. ``prepend=True`` puts a hook
    before all others; otherwise writing hooks run before reading ones.
    """

    hooking_context: Any

    def get(
        self,
        cache: TensorDict,
        module_key: str,
        cache_key: Any = None,
        callback: Callable[..., Any] | None = None,
        direction: str = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> tuple[AddedHook, CacheProxy]:
        """Store what passes a module.

        Args:
            cache: Where values go; a later call overwrites.
            module_key: Module path.
            cache_key: Key of the value; by default ``{path}_output``, ``_input``, ``_grad_input`` or ``_grad_output``.
            callback: Called by keyword with what the torch hook of the direction gets, and ``key`` and ``direction``;
                returns the value to store. Without one, it is the first tensor of what the default key names.
            direction: One of the six directions.
            prepend: Read before other hooks have changed the value.
            relative: Whether the path starts at the user's model.

        Returns:
            A handle with ``remove()``, and a proxy whose ``resolve()`` gives the value; :meth:`set` takes the proxy.
        """
        key = cache_key or f"{module_key}_{WHAT[get_direction(direction).name.removesuffix('_kwargs')]}"
        hook = _reading_hook(self.hooking_context.gate, cache, key, callback, direction)
        name = "fwd_kwargs" if direction == "fwd" and callback is None else direction
        return self._add(module_key, name, hook, prepend, relative, edits=False), CacheProxy(key, cache)

    def set(
        self,
        module_key: str,
        value: Any,
        callback: Callable[..., Any] | None = None,
        direction: str = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> AddedHook:
        """Replace what passes a module.

        Args:
            module_key: Module path.
            value: The new value, or a proxy from :meth:`get`. A tensor takes the place of the first tensor of a tuple
                or ``ModelOutput``, of the inputs, or of the gradients.
            callback: Called by keyword with what the torch hook of the direction gets, and ``value`` and ``direction``;
                returns the new value, or ``None`` to leave the old one.
            direction: One of the six directions.
            prepend: Write before other hooks.
            relative: Whether the path starts at the user's model.

        Returns:
            A handle with ``remove()``.
        """
        hook = _writing_hook(self.hooking_context.gate, value, callback, direction)
        return self._add(module_key, direction, hook, prepend, relative, edits=True)

    def get_input(self, *args: Any, **kwargs: Any) -> tuple[AddedHook, CacheProxy]:
        """Call :meth:`get` for ``fwd_pre``."""
        return self.get(*args, **kwargs | {"direction": "fwd_pre"})

    def set_input(self, *args: Any, **kwargs: Any) -> AddedHook:
        """Call :meth:`set` for ``fwd_pre``."""
        return self.set(*args, **kwargs | {"direction": "fwd_pre"})

    def get_grad(self, *args: Any, **kwargs: Any) -> tuple[AddedHook, CacheProxy]:
        """Call :meth:`get` for ``bwd``: the gradient with respect to the input."""
        return self.get(*args, **kwargs | {"direction": "bwd"})

    def set_grad(self, *args: Any, **kwargs: Any) -> AddedHook:
        """Call :meth:`set` for ``bwd``: the gradient with respect to the input."""
        return self.set(*args, **kwargs | {"direction": "bwd"})

    def get_grad_output(self, *args: Any, **kwargs: Any) -> tuple[AddedHook, CacheProxy]:
        """Call :meth:`get` for ``bwd_pre``: the gradient with respect to the output."""
        return self.get(*args, **kwargs | {"direction": "bwd_pre"})

    def set_grad_output(self, *args: Any, **kwargs: Any) -> AddedHook:
        """Call :meth:`set` for ``bwd_pre``: the gradient with respect to the output."""
        return self.set(*args, **kwargs | {"direction": "bwd_pre"})

    def stop(self, key: str) -> AddedHook:
        """End calls of the hooked module once a module has run.

        Such a call returns ``None``, and a TensorDict comes back without outputs. Calls of the model itself run in
        full.

        Args:
            key: Module path.
        """
        context = self.hooking_context

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if context.in_call and context.gate.admits() and not in_backward():
                raise EarlyStop

        return self._add(key, "fwd", hook, False, True, edits=False)

    def _add(
        self, path: str, direction: str, hook: Callable[..., Any], prepend: bool, relative: bool, *, edits: bool
    ) -> AddedHook:
        context = self.hooking_context
        context.require_active(f"hook '{path}'")
        root: Any = context.model if relative else self
        found = resolve_path(root, path)
        if len(found) != 1:
            raise ConfigError(
                f"the module path '{path}' leads to {len(found)} modules; name one, such as '{next(iter(found))}'"
            )
        order = 0 if prepend else context.gate.number
        module = next(iter(found.values()))
        return context.add_hook(Hook(module, direction, hook, edits=edits or prepend, order=order))


def _reading_hook(
    gate: Any, cache: Any, key: Any, callback: Callable[..., Any] | None, direction: str
) -> Callable[..., Any]:
    of = get_direction(direction)
    if callback is not None:
        check_callback(callback, direction, ("key", "direction"))
    whole = get_direction("fwd_kwargs") if direction == "fwd" and callback is None else of

    def hook(*passed: Any) -> Any:
        if not (gate.admits_backward() if of.is_backward else gate.admits() and not in_backward()):
            return None
        named = whole.named_arguments(passed)
        # The gradient that is read is the one that set_grad writes, and whose name the key has.
        found = named[of.written] if callback is None else callback(**named, key=key, direction=direction)
        value = first_tensor((found, passed[2]) if of.is_pre and not of.is_backward and callback is None else found)
        if value is None:
            raise StateError(
                f"the {direction!r} value for {key!r} is a {type(found).__name__} without any tensor; pass a "
                "callback that returns the tensor to store"
            )
        if callback is not None or of.is_backward or of.is_pre:
            cache.set(key, keep(value))
            return None
        kept, twin = keep_attached(value, named["args"], named["kwargs"])
        cache.set(key, kept)
        return None if twin is None else replace_first_tensor(found, twin)

    return hook


def _writing_hook(gate: Any, value: Any, callback: Callable[..., Any] | None, direction: str) -> Callable[..., Any]:
    of = get_direction(direction)
    if callback is not None:
        check_callback(callback, direction, ("value", "direction"))

    def hook(*passed: Any) -> Any:
        if not (gate.admits() or (in_backward() and gate.admits_backward())):
            return None
        named = of.named_arguments(passed)
        new = value.resolve() if isinstance(value, CacheProxy) else value
        if callback is not None:
            new = callback(**named, value=new, direction=direction)
        if new is None:
            return None
        is_input = of.is_pre and not of.is_backward
        old = named[of.written]
        if isinstance(new, Tensor):
            target = (old, passed[2]) if is_input else old
            return replace_first_tensor(target, new.to(first_tensor(target)))
        if type(new) is not type(old):
            raise StateError(
                f"the new value is a {type(new).__name__}, the {direction!r} value a {type(old).__name__}; give one "
                "of its type, or a tensor for its first tensor"
            )
        return (new, passed[2]) if is_input else new

    return hook
