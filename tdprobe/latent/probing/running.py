"""A running probing: what each hook hands to its probe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tdprobe._tracker import CallTracker
from tdprobe.contexts import Site
from tdprobe.errors import StateError
from tdprobe.hooks import Hook, first_tensor, get_direction, keep
from tdprobe.hooks.gate import in_backward
from tdprobe.latent.call_items import ItemContext
from tdprobe.latent.items import select_items
from tdprobe.modules import HookedModule
from tdprobe.stream.call import Call
from tdprobe.stream.rows import token_rows
from tdprobe.stream.tokens import Selection


class ProbingContext(ItemContext):
    """Hand each probe what its module computed, with the items of the running call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tracker = CallTracker(self.model, self.gate, self._begin)
        self._warned = False

    def enter(self, *, managed: bool) -> HookedModule:
        """Install everything or nothing."""
        self._warned = False
        return super().enter(managed=managed)

    def stopped_early(self) -> None:
        """End the forward pass."""
        self.tracker.end()

    def around(self, hooks: Sequence[Hook]) -> list[Hook]:
        """Put those that tell when a call begins and ends around other hooks, which may be on the model itself."""
        items, (begin, end) = self.item_hooks(), self.tracker.hooks
        return [*items[:1], begin, *hooks, end, *items[1:]]

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
        return (_own_rows(site, value, selection), select_items(items, selection)) if selection.n else None

    def _begin(self, call: Call) -> None:
        self.expect_items()
        if self.factory.clause is None and not self._warned and _has_pads(call):  # ty: ignore[missing-attribute]
            self._warned = True
            warnings.warn(
                "this batch is padded, and without tokens= the probes see the padding as well; "
                "tokens='last', 'mean' or 'all' reads the attention mask",
                stacklevel=2,
            )


def step_hook(context: ProbingContext, module: nn.Module, site: Site, probe: Any) -> Hook:
    """Return the hook that lets a probe step."""
    direction, step = get_direction(site.direction), _untraced(_named(probe.step, site))
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


def _own_rows(site: Site, value: Tensor, selection: Selection) -> Tensor:
    """Select rows as tensors that a probe may keep: ordinary ones, and immune to what the model writes later."""
    with torch.inference_mode(False) if value.is_inference() else nullcontext():
        rows = token_rows(site.name, value, selection)
    # Where every token counts, rows are the model's own memory.
    return keep(rows) if rows.untyped_storage()._cdata == value.untyped_storage()._cdata else rows


def _named(step: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """Add to the errors of an estimator, which knows nothing of modules, whose rows it was given."""

    def named(data: Any, **items: Any) -> None:
        try:
            step(data, **items)
        except Exception as error:
            kind, value = items.get("step_type"), first_tensor(data)
            rows = "" if value is None else f", rows of shape {tuple(value.shape)}"
            labels = "" if not hasattr(items.get("labels"), "shape") else f", labels of {tuple(items['labels'].shape)}"
            error.add_note(f"in the probe of {site.name!r} ({site.direction}), step_type={kind!r}{rows}{labels}")
            raise

    return named


def _untraced(step: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a compiled model from compiling the probe, and its training, into itself."""
    return torch.compiler.disable(step) if "torch._dynamo" in sys.modules else step


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    return args if first_tensor(args) is not None or not kwargs else tuple(kwargs.values())


def _has_pads(call: Call) -> bool:
    return (
        call.shape is not None and isinstance(call.mask, Tensor) and call.mask.ndim == 2 and not bool(call.mask.all())
    )
