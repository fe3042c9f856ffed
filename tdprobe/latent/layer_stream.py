"""Stream rows of many layers out of a model, one batch per forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdprobe._tracker import CallTracker
from tdprobe.contexts import HookingContext, HookingContextFactory, Site
from tdprobe.errors import ConfigError, StateError
from tdprobe.hooks import Hook, MultiHookHandle, first_tensor, keep, match_modules
from tdprobe.hooks.gate import in_backward
from tdprobe.hooks.match import compile_pattern
from tdprobe.latent.call_items import ItemContext, ItemModule
from tdprobe.latent.items import check_keys, select_items
from tdprobe.modules import HookedModule
from tdprobe.stats.hashing import mix64
from tdprobe.stream.batch import Batch
from tdprobe.stream.call import Call
from tdprobe.stream.ids import content_ids, row_ids
from tdprobe.stream.rows import token_rows
from tdprobe.stream.tokens import Selection, TokenClause


class StreamContext(ItemContext):
    """Collect the rows of each forward pass and hand them on when the pass has ended without an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tracker = CallTracker(self.model, self.gate, self._begin, self._finish)
        self._rows: dict[str, Tensor] = {}
        self._selection: Selection | None = None
        self._n_samples = 0
        self._next_ids: Tensor | None = None
        self._samples: Tensor | None = None
        self._texts: Tensor | None = None

    def consume(self, batch: Batch) -> None:
        """Take the rows of one finished forward pass."""
        raise NotImplementedError

    def set_sample_ids(self, ids: Tensor) -> None:
        """Number the samples of the next forward pass, instead of by their content.

        Args:
            ids: (batch,) int64; the same text must have the same number in every model that is compared.
        """
        self._next_ids = ids

    def add(self, name: str, value: Tensor) -> None:
        """Take one layer's activation."""
        selection, value = self._selection, value.detach()
        # Rows selected outside of inference mode are ordinary tensors, at no further cost.
        with torch.inference_mode(False):
            if selection is None:
                rows = value.reshape(value.shape[0], -1) if value.ndim > 1 else value.reshape(-1, 1)
            else:
                rows = token_rows(name, value, selection)
            # One device for all: a model spread over several would otherwise have no common product.
            first = next(iter(self._rows.values()), rows)
            rows = rows.to(first.device)
            # Where every token counts, rows are the model's own memory, which it may write to.
            self._rows[name] = keep(rows) if rows.untyped_storage()._cdata == value.untyped_storage()._cdata else rows

    def stopped_early(self) -> None:
        """Hand on the rows of a pass that ended early."""
        self.tracker.end()

    def _begin(self, call: Call) -> None:
        self._rows = {}
        self.expect_items()
        clause: TokenClause = self.factory.clause  # ty: ignore[missing-attribute]
        self._selection = None if call.shape is None else clause.select(call)
        self._samples, self._next_ids = self._next_ids, None
        if self._samples is not None and call.shape and len(self._samples) != call.shape[0]:
            raise ConfigError(f"{len(self._samples)} sample ids were set for a batch of {call.shape[0]} rows")

    def _finish(self, call: Call) -> None:
        rows, self._rows = self._rows, {}
        if not rows:
            return
        first = next(iter(rows.values()))
        targets = self._targets(first.shape[0], first.device)
        ids = self._ids(call, first.shape[0])
        self.consume(Batch({name: rows[name] for name in self._order(rows)}, ids, targets))

    def _targets(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """Give every row what else the call said of its sample."""
        items = self.items(backward=False)
        found = items if self._selection is None else select_items(items, self._selection)
        return {key: _as_target(key, value, n).to(device) for key, value in found.items()}

    def _order(self, rows: dict[str, Tensor]) -> list[str]:
        return [site.name for site in self.sites if site.name in rows]

    def _ids(self, call: Call, n: int) -> Tensor:
        samples = self._samples
        size = call.shape[0] if call.shape else n
        if samples is None and call.phase == "generated" and self._texts is not None and len(self._texts) == size:
            # A step sees one token of each text, which alone does not tell the texts apart.
            samples = self._texts
        if samples is None:
            samples = content_ids(call) if call.shape else None
        if samples is None:
            samples = mix64(torch.arange(self._n_samples, self._n_samples + size, device="cpu"))
        self._n_samples += size
        self._texts = samples
        return samples.cpu() if self._selection is None else row_ids(samples, self._selection)


class LayerStreaming(HookingContextFactory):
    """Base of the factories that stream rows of the layers that a pattern matches.

    Args:
        key_pattern: Regular expression matched from the start of the dotted module name.
        relative: Names start at the user's model; ``False`` starts them at the wrapper (``td_module.module``).
        tokens: Which tokens of each row count; see :class:`tdprobe.stream.tokens.TokenClause`.
        skip_first: Real tokens at the start of each row that never count.
        early_stop: End calls of the hooked module after the last layer.
        required: A pattern that matches nothing, or layers that never run, are errors.
        additional_keys: Keys of the input, or keywords, that say more of the samples; one entry for each sample or
            for each token.
    """

    _hooking_context_class: type[HookingContext] = StreamContext
    _hooked_module_class = ItemModule

    def __init__(
        self,
        key_pattern: str,
        *,
        relative: bool = True,
        tokens: Any = "all",
        skip_first: int = 1,
        early_stop: bool = False,
        required: bool = True,
        additional_keys: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        self.additional_keys = check_keys(additional_keys)
        compile_pattern(key_pattern)
        self.key_pattern = key_pattern
        self.relative = relative
        # One short text in a batch of its own must not end a long run; a stream without any row is an error later.
        self.clause = TokenClause(tokens, skip_first, may_miss=True)
        self.early_stop = early_stop
        self.required = required

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context = module.hooking_context
        if not isinstance(context, StreamContext):
            raise StateError(f"{type(self).__name__} needs a StreamContext, got {type(context).__name__}")
        prefix = "" if self.relative else module.relative_path
        matched = match_modules(context.model, self.key_pattern, prefix=prefix, required=self.required)
        begin, end = context.tracker.hooks
        items = context.item_hooks()
        hooks = [*items[:1], begin]
        for name, submodule in matched.items():
            site = Site(name)
            context.sites.append(site)
            hooks.append(self._site_hook(context, submodule, site))
        # Items are forgotten only after the rows of the pass were handed on.
        return MultiHookHandle([*hooks, end, *items[1:]])

    def _site_hook(self, context: Any, module: nn.Module, site: Site) -> Hook:
        return Hook(module, "fwd", _streaming_hook(context, site))


def _as_target(key: str, value: Any, n: int) -> Tensor:
    try:
        target = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{key!r} is a {type(value).__name__}; give numbers, one or more for each sample") from None
    if target.ndim == 0 or target.shape[0] != n:
        raise ConfigError(
            f"{key!r} has shape {tuple(target.shape)} for {n} rows; give one entry for each sample, or (batch, tokens)"
        )
    # Whole numbers stay exact: they may be labels.
    return target.detach().reshape(n, -1).to(target.dtype if target.is_floating_point() else torch.float64)


def layer_value(name: str, output: Any) -> Tensor:
    """Return the tensor of a layer's output.

    Raises:
        ConfigError: There is none.
    """
    value = first_tensor(output)
    if not isinstance(value, Tensor):
        raise ConfigError(f"layer {name!r} returns a {type(output).__name__} without any tensor to score")
    return value


def _streaming_hook(context: StreamContext, site: Site) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Outside of a call of the prepared model nothing is known about padding, so nothing is taken.
        if context.tracker.call is None or not context.gate.admits() or in_backward():
            return
        context.add(site.name, layer_value(site.name, output))
        context.fired(site)

    return hook
