"""Factories hold a configuration; the contexts they prepare put it on a model and take it off again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, overload

from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdprobe._context import HookingContext, InKeys, Site
from tdprobe._types import UnraveledKey
from tdprobe.errors import ConfigError
from tdprobe.hooks import MultiHookHandle
from tdprobe.modules import HookedModule, require_keys, require_module


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
            ConfigError: It is no module, or a key is malformed, or not among a TensorDict module's own.
        """
        require_module(module)
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


class CompositeContext(HookingContext):
    """Several contexts on one model, entered and left together.

    What a part offers, such as ``cache`` or ``scores()``, can be had here as long as only one part has it.

    Attributes:
        contexts: One per factory, in their order.
    """

    observes = False

    def __init__(self, factory: CompositeHookingContextFactory, *args: Any, **kwargs: Any) -> None:
        super().__init__(factory, *args, **kwargs)
        self.contexts: list[HookingContext] = [
            part._hooking_context_class(part, self._module, **part._hooking_context_kwargs)
            for part in factory.factories
        ]
        for context in self.contexts:
            context._path = self._path

    @property
    def n_fired(self) -> dict[str, int]:
        """How often each place has acted, by module name (summed over the parts)."""
        counts: dict[str, int] = {}
        for context in self.contexts:
            for name, count in context.n_fired.items():
                counts[name] = counts.get(name, 0) + count
        return counts

    def clear(self) -> None:
        """Empty every cache."""
        for context in self.contexts:
            if isinstance(context, (HookingContextWithCache, CompositeContext)):
                context.clear()

    def _enter_before(self, stack: ExitStack) -> TensorDictModuleBase:
        working = super()._enter_before(stack)
        for context in self.contexts:
            # Each part calls what the part before it has prepared.
            context._module = working
            working = stack.enter_context(context)
        return working

    @contextmanager
    def disable_hooks(self) -> Generator[None]:
        """Lift the hooks of every part, and set them again afterwards."""
        with ExitStack() as stack:
            stack.enter_context(super().disable_hooks())
            for context in self.contexts:
                stack.enter_context(context.disable_hooks())
            yield

    def __getattr__(self, name: str) -> Any:
        # Calls in a block of their own would be those of one part, without the others.
        if name.startswith("_") or name in ("read", "contrast"):
            raise AttributeError(name)
        owners = [context for context in self.__dict__.get("contexts", ()) if hasattr(context, name)]
        if len(owners) == 1:
            return getattr(owners[0], name)
        kinds = ", ".join(f"contexts[{self.contexts.index(context)}].{name}" for context in owners)
        raise AttributeError(
            f"several parts of the composite have {name!r}: {kinds}" if owners else f"no part has {name!r}"
        )


class CompositeHookingContextFactory(HookingContextFactory):
    """Chain factories: one block in which all of them act.

    Interventions act in the order of the factories and before everything that observes. A factory that calls the model
    in its own way, such as patching, does so within the calls of those after it.

    Args:
        factories: Of any kind, with contexts of their own or not. The prepared context gives out what its parts have,
            such as ``context.cache``; with several caches, ``context.contexts[i].cache``.

    Raises:
        ConfigError: There is no factory, or one ends calls early, which would cut off the others.

    Example:
        >>> import torch
        >>> from tdprobe.latent import ActivationCaching, SteeringVectors
        >>> steering = SteeringVectors(["0"], lambda module_key, output: output * 0 + 1)
        >>> factory = CompositeHookingContextFactory(ActivationCaching("0"), steering)
        >>> with factory.prepare(nn.Sequential(nn.Linear(2, 2))) as hooked:
        ...     out = hooked(torch.ones(1, 2))
        >>> hooked.hooking_context.cache["0"].tolist()
        [[1.0, 1.0]]
    """

    _hooking_context_class: type[HookingContext] = CompositeContext

    def __init__(self, *factories: HookingContextFactory) -> None:
        super().__init__()
        for factory in factories:
            if not isinstance(factory, HookingContextFactory):
                raise ConfigError(f"factories are composed, got a {type(factory).__name__}; pass them one by one")
            if factory.early_stop:
                raise ConfigError(
                    f"early_stop of {type(factory).__name__} would end the pass for the other factories; "
                    "leave it off in a composite"
                )
        if not factories:
            raise ConfigError("a composite has at least one factory")
        self.factories = list(factories)


__all__ = [
    "CompositeContext",
    "CompositeHookingContextFactory",
    "HookingContext",
    "HookingContextFactory",
    "HookingContextWithCache",
    "Site",
]
