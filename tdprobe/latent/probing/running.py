"""A running probing: which items belong to the call, and what each hook hands to its probe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from tdprobe._tracker import CallTracker
from tdprobe.contexts import HookingContext, Site
from tdprobe.errors import CallError, StateError
from tdprobe.hooks import Hook, first_tensor, get_direction
from tdprobe.hooks.gate import in_backward
from tdprobe.latent.probing.items import read_items, select_items, top_names
from tdprobe.modules import HookedModule, NamedModule
from tdprobe.stream.call import Call
from tdprobe.stream.rows import token_rows


class ProbingContext(HookingContext):
    """Know the items of the running call, and forget them when it ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tracker = CallTracker(self.model, self.gate, self._begin)
        self._items: dict[str, Any] | None = None
        # A backward pass comes after its call has ended.
        self._last_items: dict[str, Any] | None = None
        self._given: dict[str, Any] = {}
        self._announced = False
        self._warned = False
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
        self._warned = False
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

    def stopped_early(self) -> None:
        """End the forward pass."""
        self.tracker.end()

    def call_hooks(self) -> list[Hook]:
        """Return the hooks that tell when a call begins and ends."""
        module = self.td_module
        read = [Hook(module, "fwd_pre", self._read), Hook(module, "fwd", self._end)] if self.keys else []
        return read + self.tracker.hooks

    @contextmanager
    def bringing(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: dict[str, Any]) -> Generator[None]:
        """Mark a call of the hooked module, with the items that were given by keyword."""
        self._given = own
        if self.keys and not (args and is_tensor_collection(args[0])):
            missing = [key for key in self.keys if key not in own]
            if missing:
                raise CallError(
                    f"this context reads {_listed(self.keys)} from each call, and {_listed(missing)} is "
                    "missing; pass a TensorDict with them, or keywords: hooked(x, labels=y, step_type='fit')"
                )
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

    def rows(self, site: Site, data: Any, items: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Select tokens, if a clause says which; ``None`` where there is none of them in this pass."""
        clause = self.factory.clause  # ty: ignore[missing-attribute]
        if clause is None:
            return data, items
        call = self.tracker.call
        if call is None:
            raise StateError(
                "tokens are selected by the inputs of the prepared model, and a module of it was called on "
                "its own; prepare that module instead, or drop tokens="
            )
        value = first_tensor(data)
        if not isinstance(value, Tensor):
            raise StateError(f"tokens are selected from a tensor, and {site.name!r} gave a {type(data).__name__}")
        selection = clause.select(call)
        return (token_rows(site.name, value, selection), select_items(items, selection)) if selection.n else None

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

    def _begin(self, call: Call) -> None:
        if not self._announced and self.model is not self.td_module:
            self._forget()
        self._announced = False
        if self.factory.clause is None and not self._warned and _has_pads(call):  # ty: ignore[missing-attribute]
            self._warned = True
            warnings.warn(
                "this batch is padded, and without tokens= the probes see the padding as well; "
                "tokens='last', 'mean' or 'all' reads the attention mask",
                stacklevel=2,
            )

    def _forget(self) -> None:
        self._items = self._last_items = None


class ProbedModule(HookedModule):
    """A model whose calls bring items for probes, in the TensorDict or by keyword."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the items go to the probes."""
        context: ProbingContext = self.hooking_context
        own = {name: kwargs.pop(name) for name in context.keys if name in kwargs}
        if len(args) == 1 and isinstance(args[0], Mapping) and not is_tensor_collection(args[0]):
            brought = {name: args[0][name] for name in context.keys if name in args[0]}
            if brought:
                own = brought | own
                args = ({name: value for name, value in args[0].items() if name not in brought},)
        context.require_active("call the hooked module")
        with context.bringing(args, kwargs, own):
            return super().forward(*args, **kwargs)


def step_hook(context: ProbingContext, module: nn.Module, site: Site, probe: Any) -> Hook:
    """Return the hook that lets a probe step."""
    direction, step = get_direction(site.direction), _untraced(probe.step)
    if direction.is_backward:
        return Hook(module, site.direction, _backward_hook(context, site, step))

    def hook(*passed: Any) -> None:
        if not context.gate.admits() or in_backward():
            return
        data = _input_of(passed[1], passed[2]) if direction.is_pre else direction.named_arguments(passed)["output"]
        selected = context.rows(site, data, context.items(backward=False))
        if selected is not None:
            step(selected[0], **selected[1])
            context.fired(site)

    return Hook(module, site.direction, hook)


def _backward_hook(context: ProbingContext, site: Site, step: Callable[..., Any]) -> Callable[..., None]:
    direction = get_direction(site.direction)

    def hook(*passed: Any) -> None:
        if context.gate.admits_backward():
            data = direction.named_arguments(passed)[direction.written]
            step(data, **context.items(backward=True))
            context.fired(site)

    return hook


def _untraced(step: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a compiled model from compiling the probe, and its training, into itself."""
    return torch.compiler.disable(step) if "torch._dynamo" in sys.modules else step


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    return args if first_tensor(args) is not None or not kwargs else tuple(kwargs.values())


def _listed(keys: Sequence[Any]) -> str:
    return ", ".join(map(repr, keys))


def _has_pads(call: Call) -> bool:
    return call.shape is not None and call.mask is not None and call.mask.ndim == 2 and not bool(call.mask.all())
