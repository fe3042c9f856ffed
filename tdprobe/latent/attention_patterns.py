"""Attention weights, from a model that computes them only when asked."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdprobe.contexts import HookingContextFactory, HookingContextWithCache, Site
from tdprobe.errors import ConfigError, StateError
from tdprobe.hooks import Hook, MultiHookHandle, keep, match_modules
from tdprobe.hooks.gate import in_backward
from tdprobe.hooks.match import compile_pattern
from tdprobe.modules import HookedModule

# Where attention is in the models of transformers: Llama and its kin, BERT, GPT-2.
ATTENTION = r".*(self_attn|attention\.self|attn)$"


class AttentionContext(HookingContextWithCache):
    """Attention weights by module name, in ``cache``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The configurations that are switched: the model may have got others when the block ends.
        self._switched: list[Any] = []

    def enter(self, *, managed: bool) -> HookedModule:
        """Install everything or nothing, and let the model compute attention by its plain formula."""
        hooked = super().enter(managed=managed)
        self._switch(on=True)
        return hooked

    def _leave(self, error: BaseException | None = None) -> None:
        try:
            super()._leave(error)
        finally:
            self._switch(on=False)

    @contextmanager
    def disable_hooks(self) -> Generator[None]:
        """Lift the hooks, and let the model compute attention its own way meanwhile."""
        hooked = self._hooked
        try:
            with super().disable_hooks():
                self._switch(on=False)
                yield
        finally:
            if hooked is not None and self._hooked is hooked and not self._lifts:
                self._switch(on=True)

    def _switch(self, *, on: bool) -> None:
        if on == bool(self._switched):
            return
        configs = _configs(self.model) if on else self._switched
        self._switched = configs if on else []
        for config in configs:
            (_switch_on if on else _switch_off)(config)


class AttentionPatterns(HookingContextFactory):
    """Cache the attention weights of some layers, (batch, heads, queries, keys), whose rows sum to one.

    Fused attention never forms these weights, so the model is switched to its plain formula (``"eager"``)
    while the block lasts, and back at its end. Outputs inside the block differ from those outside by
    rounding; the switch is the model's, so those of other threads do so as well meanwhile. A copy of the
    model is not switched.

    Args:
        key_pattern: Regular expression matched from the start of the dotted module name; by default the
            attention modules of the usual models.
        early_stop: End calls of the hooked module after the last layer.
        required: A pattern that matches nothing, or modules that never run, are errors.

    Raises:
        re.error: ``key_pattern`` is no regular expression.
        ConfigError: In a call: a module gives no weights, or weights that do not sum to one, as under
            dropout.

    Example:
        >>> class Layer(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        ...     def forward(self, x): return self.attn(x, x, x, average_attn_weights=False)[0]
        >>> with AttentionPatterns().prepare(Layer()) as hooked:
        ...     out = hooked(torch.randn(1, 3, 4))
        >>> hooked.hooking_context.cache["attn"].shape
        torch.Size([1, 2, 3, 3])
    """

    _hooking_context_class = AttentionContext

    def __init__(self, key_pattern: str = ATTENTION, *, early_stop: bool = False, required: bool = True) -> None:
        super().__init__()
        compile_pattern(key_pattern)
        self.key_pattern = key_pattern
        self.early_stop = early_stop
        self.required = required

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context = module.hooking_context
        if not isinstance(context, AttentionContext):
            raise StateError(f"AttentionPatterns needs an AttentionContext, got {type(context).__name__}")
        hooks = []
        for name, part in match_modules(context.model, self.key_pattern, required=self.required).items():
            site = Site(name)
            context.sites.append(site)
            hooks.append(_capture(context, part, site))
        return MultiHookHandle(hooks)


class _Eager(str):
    """The name of the plain formula here, and of the model's own implementation in a copy of its configuration.

    A model that is copied or saved inside a block must not stay switched.
    """

    before: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.before

    def __reduce__(self) -> tuple[Any, ...]:
        return (_itself, (self.before,))


def _itself(value: Any) -> Any:
    return value


# By identity of the configuration: how many blocks need eager attention, and what it was before the first of them.
_needed: dict[int, tuple[int, Any]] = {}


def _switch_on(config: Any) -> None:
    count, before = _needed.get(id(config), (0, config._attn_implementation_internal))
    _needed[id(config)] = (count + 1, before)
    eager = _Eager("eager")
    eager.before = before
    # Not the public setter: it would write into configurations of other models' parts as well.
    config._attn_implementation_internal = eager


def _switch_off(config: Any) -> None:
    count, before = _needed.pop(id(config))
    if count > 1:
        _needed[id(config)] = (count - 1, before)
    else:
        config._attn_implementation_internal = before


def _configs(model: nn.Module) -> list[Any]:
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation_internal")]


def _capture(context: AttentionContext, module: nn.Module, site: Site) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if context.gate.admits() and not in_backward():
            context.cache.set(site.name, keep(_weights(output, module, site.name)))
            context.fired(site)

    return Hook(module, "fwd", hook)


def _weights(output: Any, module: nn.Module, name: str) -> Tensor:
    found = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    if not isinstance(found, Tensor) or found.ndim < 3:
        raise ConfigError(
            f"{name!r} ({type(module).__name__}) gives no attention weights; match modules that return "
            "(output, weights), and ask for the weights where a module takes need_weights"
        )
    sums = found.detach().float().sum(-1)
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 2e-2
    if not bool(((sums - 1).abs() <= tolerance).all()):
        hint = "; in train mode dropout acts on the weights: call model.eval()" if module.training else ""
        raise ConfigError(
            f"the attention weights of {name!r} sum to {float(sums.min()):.4g} ... {float(sums.max()):.4g} "
            f"along keys, instead of 1{hint}"
        )
    return found
