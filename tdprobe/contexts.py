"""Factories hold a configuration; the contexts they prepare put it on a model and take it off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdprobe._context import HookingContext, InKeys, Site
from tdprobe._types import UnraveledKey
from tdprobe.hooks import MultiHookHandle
from tdprobe.modules import HookedModule, require_keys


class HookingContextFactory:
    """Hold a configuration that can be applied to any number of models.

    Subclasses override :meth:`_hook_module` (and, where they must, the other underscored methods).

    Attributes:
        required: Whether a pattern that matches nothing, or hooks that never fire, are errors.
        early_stop: Whether a call of the hooked module ends once every hook has fired.
    """

    _hooked_module_class: type[HookedModule] = HookedModule
    _hooking_context_class: type[HookingContext] = HookingContext
    required: bool = True
    early_stop: bool = False

    def __init__(self) -> None:
        self._hooking_context_kwargs: dict[str, Any] = {}
        self._hooked_module_kwargs: dict[str, Any] = {}

    @overload
    def prepare(
        self,
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[UnraveledKey] | None = None,
        *,
        return_context: Literal[True] = True,
    ) -> HookingContext: ...

    @overload
    def prepare(
        self,
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[UnraveledKey] | None = None,
        *,
        return_context: Literal[False],
    ) -> HookedModule: ...

    def prepare(
        self,
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[UnraveledKey] | None = None,
        *,
        return_context: bool = True,
    ) -> HookingContext | HookedModule:
        """Apply the configuration to a model, without installing anything yet.

        Args:
            module: Any ``nn.Module``, or a TensorDict module, which is taken as it is.
            in_keys: For a plain module: keys that go in by position, or a dict from forward's names to keys.
                For a TensorDict module: some of its own keys, checked only.
            out_keys: Keys under which outputs are written.
            return_context: ``False`` enters at once and returns the hooked module; ``hooked.restore()`` undoes it.

        Raises:
            ConfigError: A key is malformed, or not among a TensorDict module's own.
        """
        if isinstance(module, TensorDictModuleBase):
            require_keys("in_keys", list(in_keys or ()), module.in_keys)
            require_keys("out_keys", list(out_keys or ()), module.out_keys)
        context = self._hooking_context_class(self, module, in_keys, out_keys, **self._hooking_context_kwargs)
        return context if return_context else context.enter(managed=False)

    def _prepare_module(
        self, module: TensorDictModuleBase, in_keys: list[Any], out_keys: list[Any], extra_relative_path: str
    ) -> TensorDictModuleBase:
        return module

    def _restore_module(
        self, module: TensorDictModuleBase, in_keys: list[Any], out_keys: list[Any], extra_relative_path: str
    ) -> TensorDictModuleBase:
        return module

    def _spawn_hooked_module(
        self, prep_module: TensorDictModuleBase, hooking_context: HookingContext, extra_relative_path: str
    ) -> HookedModule:
        kwargs = dict(self._hooked_module_kwargs)
        base = kwargs.pop("relative_path", "td_module")
        path = ".".join(part for part in (base, extra_relative_path) if part)
        return self._hooked_module_class(prep_module, hooking_context=hooking_context, relative_path=path, **kwargs)

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        return MultiHookHandle()


class HookingContextWithCache(HookingContext):
    """A context that fills a cache.

    Args:
        cache: The caller's TensorDict, or ``None`` for a fresh one.
        clear_cache: Empty it on every enter.
    """

    def __init__(self, *args: Any, cache: TensorDict | None = None, clear_cache: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache = TensorDict() if cache is None else cache
        self._clear_on_enter = clear_cache

    @property
    def cache(self) -> TensorDict:
        """Values by module name, or by (direction, name)."""
        return self._cache

    def clear(self) -> None:
        """Empty the cache."""
        self._cache.clear()

    def _before_enter(self) -> None:
        if self._clear_on_enter:
            self.clear()


__all__ = ["HookingContext", "HookingContextFactory", "HookingContextWithCache", "Site"]
