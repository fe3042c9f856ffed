"""Cache activations while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdprobe._tracker import CallTracker
from tdprobe._types import UnraveledKey
from tdprobe.contexts import HookingContextFactory, HookingContextWithCache, Site
from tdprobe.errors import CallError, ConfigError
from tdprobe.hooks import Hook, HookDirection, MultiHookHandle, check_callback, get_direction, match_modules
from tdprobe.hooks.match import compile_pattern
from tdprobe.latent.caching_hooks import capture_hook
from tdprobe.modules import HookedModule
from tdprobe.stream.tokens import TokenClause

Key = str | tuple[str, str]


class CachingContext(HookingContextWithCache):
    """A running cache.

    Attributes:
        occurrences: With ``occurrences="all"``, every value of a key in the order of calls: the passes of
            ``generate()``, prompt first, or the uses of a module that runs several times.
        phases: ``"prompt"`` or ``"generated"`` for each of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.occurrences: dict[Key, list[Any]] = {}
        self.phases: dict[Key, list[str]] = {}
        self.tracker: CallTracker | None = None

    @property
    def clause(self) -> TokenClause | None:
        """Which tokens are cached; ``None``: whole values."""
        return self.factory.clause  # ty: ignore[missing-attribute]

    def clear(self) -> None:
        """Empty the cache and what is kept of earlier occurrences."""
        super().clear()
        self.occurrences.clear()
        self.phases.clear()

    def read(self, *args: Any, **kwargs: Any) -> TensorDict:
        """Call the hooked module once, in a block of its own, and return the cache."""
        with self as hooked:
            hooked(*args, **kwargs)
        return self.cache

    def stopped_early(self) -> None:
        """Forget the pass that ended early, so that its mask selects nothing afterwards."""
        if self.tracker is not None:
            self.tracker.end()

    def _other_reason(self) -> str:
        return "" if self.clause is None else f", or no token of their calls matched tokens={self.clause.tokens!r}"

    def stacked(self, key: Key) -> Tensor:
        """Stack every occurrence of a key along a new first axis.

        Raises:
            ConfigError: There are none, or their shapes differ.
        """
        values = self.occurrences.get(key, [])
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) != 1:
            raise ConfigError(
                f"the occurrences of {key!r} cannot be stacked: "
                + (f"their shapes are {sorted(shapes)}" if shapes else "there are none (occurrences='all' keeps them)")
            )
        return torch.stack(values)

    def store(self, key: Key, value: Tensor | TensorDictBase) -> None:
        """Put one captured value into the cache."""
        self._cache.set(key, value)
        if self.factory.occurrences == "all":  # ty: ignore[missing-attribute]
            self.occurrences.setdefault(key, []).append(value)
            call = self.tracker.call if self.tracker else None
            self.phases.setdefault(key, []).append(call.phase if call else "prompt")


class CachingModule(HookedModule):
    """A model whose calls hand out the cache with the outputs, if there is a key for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        key: Any = self.hooking_context.factory.cache_key
        self.__dict__["_published"] = key
        if key is None:
            return
        taken = [out for out in self.td_module.out_keys if _overlap(_parts(out), _parts(key))]
        if taken:
            raise ConfigError(f"cache_key={key!r} is in the way of the output {taken[0]!r}; choose another key")
        self._out_keys_apparent = [*self.td_module.out_keys, key]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; a TensorDict gets what is cached by then, which later calls leave alone."""
        result = super().forward(*args, **kwargs)
        if self._published is not None and len(args) == 1 and isinstance(args[0], TensorDictBase):
            result.set(self._published, self.hooking_context.cache.copy())
        return result


class ActivationCaching(HookingContextFactory):
    """Cache activations of the modules that a pattern matches.

    ``factory.prepare(model).read(**encoding)`` is the short form of a block with a single call: it returns the cache.

    Values are not detached and not copied: memory is shared until somebody writes to it in place, and such a write does
    not show in the cache. ``retain_grad()`` on a value gets the gradient of the model; ``torch.autograd.grad`` with
    respect to it works for outputs that a module made itself, not for inputs that it was given or hands back.
    ``context.cache[name]`` is the last call. Of a tuple or ``ModelOutput`` the first tensor is taken.

    Args:
        key_pattern: Regular expression matched from the start of the dotted module name.
        relative: Names start at the user's model; ``False`` starts them at the wrapper, where the model itself
            has a name too (``td_module.module``).
        cache: The TensorDict to fill; ``None`` makes one per context.
        callback: Called by keyword with what the torch hook of the direction gets, and ``key`` (that of the cache) and
            ``direction``; returns the value to cache.
        directions: ``"fwd"``, ``"fwd_kwargs"``, ``"fwd_pre"``, ``"fwd_pre_kwargs"``, ``"bwd"``, ``"bwd_pre"``;
            ``None`` means ``["fwd"]``.
        use_nested_keys: Use ``(direction, name)`` as keys; always so for more than one direction.
        clear_cache: Empty the cache on every enter.
        cache_key: Write a copy of the cache (not of its tensors) under this key into the TensorDict of each call of
            the hooked module; ``None`` leaves it with the context only.
        tokens: Cache only these tokens, as (n, width) rows; see :class:`tdprobe.stream.tokens.TokenClause`.
        skip_first: With ``tokens``: leave out the first real tokens of each row.
        occurrences: ``"last"`` or ``"all"``; with ``"all"``, ``context.occurrences`` keeps every call.
        early_stop: End calls of the hooked module once every matched module has run; such a call returns
            ``None`` (a TensorDict comes back without outputs). Calls of the model itself and ``generate`` run in full.
        required: A pattern that matches nothing, or modules that never run, are errors.

    Raises:
        re.error: ``key_pattern`` is no regular expression.
        ConfigError: Another argument is not allowed; on enter also for a pattern that matches nothing.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True))
        >>> with ActivationCaching("0").prepare(model) as hooked:
        ...     out = hooked(torch.ones(2, 4))
        >>> hooked.hooking_context.cache["0"].shape
        torch.Size([2, 3])
    """

    _hooking_context_class = CachingContext
    _hooked_module_class = CachingModule

    def __init__(
        self,
        key_pattern: str,
        relative: bool = True,
        cache: TensorDict | None = None,
        callback: Callable[..., Any] | None = None,
        directions: Sequence[HookDirection] | None = None,
        use_nested_keys: bool = False,
        clear_cache: bool = True,
        cache_key: str | tuple[str, ...] | None = None,
        *,
        tokens: Any = None,
        skip_first: int = 0,
        occurrences: Literal["last", "all"] = "last",
        early_stop: bool = False,
        required: bool = True,
    ) -> None:
        super().__init__()
        if occurrences not in ("last", "all"):
            raise ConfigError(f"occurrences is 'last' or 'all', got {occurrences!r}")
        if early_stop and occurrences == "all":
            raise ConfigError(
                "early_stop ends a pass at the first run of each module; occurrences='all' cannot be kept"
            )
        if cache_key is not None and not isinstance(cache_key, UnraveledKey):
            raise CallError(f"cache_key is a string, a flat tuple of strings or None, got {cache_key!r}")
        selects = tokens is not None or bool(skip_first)
        self.key_pattern = key_pattern
        self._relative = relative
        self._callback = callback
        self._directions = _checked_directions(directions, early_stop=early_stop, selects=selects)
        self._use_nested_keys = use_nested_keys or len(self._directions) > 1
        self.cache_key = cache_key
        self.clause = TokenClause("all" if tokens is None else tokens, skip_first) if selects else None
        self.occurrences = occurrences
        self.early_stop = early_stop
        self.required = required
        self._hooking_context_kwargs = {"cache": cache, "clear_cache": clear_cache}

    @property
    def key_pattern(self) -> str:
        """The regular expression that names must match from their start."""
        return self._key_pattern

    @key_pattern.setter
    def key_pattern(self, pattern: str) -> None:
        compile_pattern(pattern)
        self._key_pattern = pattern

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context: CachingContext = module.hooking_context
        prefix = "" if self._relative else module.relative_path
        matched = match_modules(context.model, self._key_pattern, prefix=prefix, required=self.required)
        if self._callback is not None:
            for direction in self._directions:
                check_callback(self._callback, direction, ("key", "direction"))
        hooks: list[Hook] = []
        if self.clause is not None or self.occurrences == "all":
            context.tracker = CallTracker(context.model, context.gate)
        # A call ends after every hook on the model itself.
        begin, end = ([hook] for hook in context.tracker.hooks) if context.tracker else ([], [])
        for name, submodule in matched.items():
            for direction in self._directions:
                site = Site(name, direction)
                context.sites.append(site)
                hooks.append(capture_hook(context, submodule, site, self._key(site), self._callback))
        return MultiHookHandle([*begin, *hooks, *end])

    def _key(self, site: Site) -> Key:
        return (site.direction, site.name) if self._use_nested_keys else site.name


def _parts(key: Any) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    return all(x == y for x, y in zip(a, b, strict=False))


def _checked_directions(directions: Sequence[str] | None, *, early_stop: bool, selects: bool) -> list[str]:
    """List the directions, if they go with what else was asked for."""
    listed = [directions] if isinstance(directions, str) else list(directions or ["fwd"])
    backward = [direction for direction in listed if get_direction(direction).is_backward]
    if backward and early_stop:
        raise ConfigError("early_stop ends the forward pass, so there is no backward pass to cache")
    if backward and selects:
        raise ConfigError(f"tokens are selected in forward passes; select in a callback for {backward[0]!r}")
    return listed
