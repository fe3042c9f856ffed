"""What a call brings besides the inputs of the model, in its TensorDict or by keyword."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tensordict import TensorDictBase, is_tensor_collection
from torch import nn

from tdprobe.contexts import HookingContext
from tdprobe.errors import CallError, StateError, closest
from tdprobe.hooks import Hook
from tdprobe.latent.items import read_items, top_names
from tdprobe.modules import HookedModule, NamedModule


class ItemContext(HookingContext):
    """Know the items of the running call, and forget them when it ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._items: dict[str, Any] | None = None
        # A backward pass comes after its call has ended.
        self._last_items: dict[str, Any] | None = None
        self._given: dict[str, Any] = {}
        self._announced = False
        self._withheld_before: frozenset[str] = frozenset()

    @property
    def keys(self) -> tuple[Any, ...]:
        """What every call brings besides the model's inputs."""
        return self.factory.additional_keys or ()  # ty: ignore[missing-attribute]

    @property
    def td_module(self) -> nn.Module:
        """The TensorDict module inside any wrappers of other contexts."""
        module: Any = self._module
        while isinstance(module, HookedModule):
            module = module.td_module
        return module

    def enter(self, *, managed: bool) -> HookedModule:
        """Install everything or nothing, and keep the items away from the model."""
        self._forget()
        hooked = super().enter(managed=managed)
        if isinstance(module := self.td_module, NamedModule):
            self._withheld_before = module.withheld
            module.withheld |= top_names(self.keys)
        return hooked

    def _leave(self, error: BaseException | None = None) -> None:
        try:
            super()._leave(error)
        finally:
            self._forget()
            if isinstance(module := self.td_module, NamedModule):
                module.withheld = self._withheld_before

    def item_hooks(self) -> list[Hook]:
        """Return the hooks that read the items of a call."""
        module = self.td_module
        return [Hook(module, "fwd_pre", self._read), Hook(module, "fwd", self._end)] if self.keys else []

    @contextmanager
    def bringing(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: dict[str, Any]) -> Generator[None]:
        """Mark a call of the hooked module, with the items that were given by keyword."""
        self._given = own
        if self.keys and not (args and is_tensor_collection(args[0])):
            missing = [key for key in self.keys if key not in own]
            if missing:
                raise CallError(_lacking(self.keys, missing, kwargs))
            self._announce(own)
        try:
            yield
        finally:
            self._given, self._items, self._announced = {}, None, False

    def items(self, *, backward: bool) -> dict[str, Any]:
        """Return the items of the running call.

        Raises:
            StateError: The model runs without a call that brought them.
        """
        if not self.keys:
            return {}
        found = self._last_items if backward else self._items
        if found is None:
            raise StateError(
                f"there are no labels for this call (nothing for {_listed(self.keys)}): the model was "
                "called directly. Call the module that the block yields, with a TensorDict or keywords that "
                "bring them; `with hooked.disable_context_hooks():` runs the model without probes"
            )
        return found

    def expect_items(self) -> None:
        """Begin a forward pass of the model: items of an earlier one no longer hold."""
        if not self._announced and self.model is not self.td_module:
            self._forget()
        self._announced = False

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.gate.admits():
            return
        source = args[0] if args else kwargs.get("tensordict")
        if isinstance(source, TensorDictBase):
            self._announce(read_items(source, self.keys, self._given))
        elif self._items is None:
            raise CallError(
                f"{_listed(self.keys)} are read from a TensorDict, and the module was called with a "
                f"{type(source).__name__}; pass a TensorDict that has them"
            )

    def _announce(self, items: Mapping[str, Any]) -> None:
        self._items = self._last_items = dict(items)
        self._announced = True

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.gate.admits():
            self._items = None

    def _forget(self) -> None:
        self._items = self._last_items = None


class ItemModule(HookedModule):
    """A model whose calls bring items for the context, in the TensorDict or by keyword."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the items go to the context."""
        context: ItemContext = self.hooking_context
        own = {name: kwargs.pop(name) for name in context.keys if name in kwargs}
        if len(args) == 1 and isinstance(args[0], Mapping) and not is_tensor_collection(args[0]):
            brought = {name: args[0][name] for name in context.keys if name in args[0]}
            if brought:
                own = brought | own
                args = ({name: value for name, value in args[0].items() if name not in brought},)
        context.require_active("call the hooked module")
        with context.bringing(args, kwargs, own):
            return super().forward(*args, **kwargs)


def _lacking(keys: Sequence[Any], missing: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    near = [name for key in missing for name in closest(str(key), kwargs)]
    hint = f" (the call has {_listed(near)}: is that a typing error?)" if near else ""
    # A tuple is a nested key, which only a TensorDict can hold.
    words = [f"{key}=..." for key in keys if isinstance(key, str)]
    how = f", or keywords: hooked(x, {', '.join(words)})" if len(words) == len(keys) else ""
    verb = "is" if len(missing) == 1 else "are"
    return (
        f"this context reads {_listed(keys)} from each call, and {_listed(missing)} {verb} missing{hint}; "
        f"pass a TensorDict with them{how}"
    )


def _listed(keys: Sequence[Any]) -> str:
    return ", ".join(map(repr, keys))
