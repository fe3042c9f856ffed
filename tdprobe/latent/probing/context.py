"""Let probes step while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdprobe.contexts import HookingContextFactory, Site
from tdprobe.errors import ConfigError
from tdprobe.hooks import Hook, HookDirection, MultiHookHandle, get_direction, match_modules
from tdprobe.hooks.match import compile_pattern
from tdprobe.latent.call_items import ItemModule
from tdprobe.latent.items import check_keys
from tdprobe.latent.probing.running import ProbingContext, step_hook
from tdprobe.modules import HookedModule
from tdprobe.stream.tokens import TokenClause


class Steps(Protocol):
    """What a probe is: anything with ``step``."""

    def step(self, data: Any, **kwargs: Any) -> Any:
        """Take what a hook got, with the items of the call."""


class Probing(HookingContextFactory):
    """Show what the matched modules compute to probes, which fit or predict while the model runs.

    ``probe_factory(name, direction)`` is called once per matched module and direction when the block is
    entered. At each run of the module, ``step(data, **items)`` is called: data is the module's output
    (``fwd``), its ``args`` (``fwd_pre``; the values of its keywords where it is called by keywords only), or
    its gradients (``bwd``: ``grad_input``, ``bwd_pre``: ``grad_output``). Items are those that
    ``additional_keys`` names. They come with the call::

        hooked(TensorDict({"input": x, "labels": y, "step_type": "fit"}))    # or by keyword, whatever the
        model takes: hooked(x, labels=y, step_type="fit") hooked(encoding, labels=y, step_type="predict")
        hooked(**encoding, labels=y, step_type="predict")

    They are not given to the model, even if its forward takes such a name (``labels`` of a language model),
    unless ``in_keys`` says so. They hold for this call, and for backward passes until the next one.

    Args:
        key_pattern: Regular expression matched from the start of the dotted module name.
        probe_factory: Such as ``ProbeManager(...).probe_factory``.
        relative: Names start at the user's model; ``False`` starts them at the wrapper (``td_module.module``).
        directions: As for caching; ``None`` means ``["fwd"]``.
        additional_keys: Keys of the input that become keywords of ``step``, such as ``["labels",
            "step_type"]``.
        classes_to_hook: Only these classes; ``None`` means every module.
        classes_to_skip: Not these; ``None`` means ``ModuleList``, ``Sequential`` and TensorDict modules.
        tokens: Show the selected tokens only, as (n, width) rows, never padding; items are selected alike
            (repeated for the tokens of a sample, or taken from (batch, tokens)). See
            :class:`tdprobe.stream.tokens.TokenClause`. Without it data is what the module gave: padding is in
            it (a warning says so), and :class:`Probe` flattens (batch, tokens, width) to (batch, tokens *
            width).
        skip_first: With ``tokens``: real tokens at the start of each row that never count.
        early_stop: End calls of the hooked module once every matched module has run.
        required: A pattern that matches nothing, or modules that never run, are errors.

    Raises:
        re.error: ``key_pattern`` is no regular expression.
        ConfigError: Another argument is not allowed; on enter also for a pattern that matches nothing.

    Example:
        >>> class Print:
        ...     def step(self, data, labels): print(data.shape, labels.tolist())
        >>> probing = Probing("0", lambda name, direction: Print(), additional_keys=["labels"])
        >>> with probing.prepare(nn.Sequential(nn.Linear(3, 4), nn.ReLU())) as hooked:
        ...     out = hooked(torch.ones(2, 3), labels=torch.tensor([0, 1]))
        torch.Size([2, 4]) [0, 1]

    References:
        Alain, Bengio 2017, Understanding intermediate layers using linear classifier probes;
        Kim et al. 2018, Interpretability beyond feature attribution (TCAV).
    """

    _hooking_context_class = ProbingContext
    _hooked_module_class = ItemModule
    default_classes_to_hook: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)
    default_classes_to_skip: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.ModuleList,
        nn.Sequential,
        TensorDictModuleBase,
    )

    def __init__(
        self,
        key_pattern: str,
        probe_factory: Callable[[str, str], Steps],
        relative: bool = True,
        directions: Sequence[HookDirection] | None = None,
        additional_keys: Sequence[Any] | None = None,
        classes_to_hook: Sequence[type[nn.Module]] | None = None,
        classes_to_skip: Sequence[type[nn.Module]] | None = None,
        *,
        tokens: Any = None,
        skip_first: int = 0,
        early_stop: bool = False,
        required: bool = True,
    ) -> None:
        super().__init__()
        self.key_pattern = key_pattern
        if not callable(probe_factory):
            raise ConfigError(
                f"probe_factory is called with (name, direction) and returns a probe; got {probe_factory!r}"
            )
        self._probe_factory = probe_factory
        self._relative = relative
        self._directions: list[str] = [directions] if isinstance(directions, str) else list(directions or ["fwd"])
        backward = [direction for direction in self._directions if get_direction(direction).is_backward]
        if early_stop and backward:
            raise ConfigError("early_stop ends the forward pass, so there is no backward pass to probe")
        if backward and (tokens is not None or skip_first):
            raise ConfigError(f"tokens are selected in forward passes; select in the probe for {backward[0]!r}")
        # An empty list of keys still says that calls bring items.
        self.additional_keys = None if additional_keys is None else check_keys(additional_keys)
        self._hooked_classes = _classes("classes_to_hook", classes_to_hook, self.default_classes_to_hook)
        self._skipped_classes = _classes("classes_to_skip", classes_to_skip, self.default_classes_to_skip)
        selects = tokens is not None or skip_first
        self.clause = TokenClause("all" if tokens is None else tokens, skip_first) if selects else None
        self.early_stop = early_stop
        self.required = required

    @property
    def key_pattern(self) -> str:
        """The regular expression that names must match from their start."""
        return self._key_pattern

    @key_pattern.setter
    def key_pattern(self, pattern: str) -> None:
        compile_pattern(pattern)
        self._key_pattern = pattern

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context = module.hooking_context
        if not isinstance(context, ProbingContext):
            raise ConfigError(f"Probing needs a ProbingContext, got {type(context).__name__}")
        probes: list[Any] = []
        try:
            hooks = self._step_hooks(context, self._matched(context, module), probes)
            return MultiHookHandle(context.around(hooks))
        except BaseException:
            for probe in probes:
                getattr(probe, "discard", lambda: None)()
            raise

    def _matched(self, context: ProbingContext, module: HookedModule) -> dict[str, nn.Module]:
        prefix = "" if self._relative else module.relative_path
        found = match_modules(context.model, self.key_pattern, prefix=prefix, required=self.required)
        chosen = {
            name: part
            for name, part in found.items()
            if isinstance(part, self._hooked_classes) and not isinstance(part, self._skipped_classes)
        }
        if self.required and not chosen:
            name, part = next(iter(found.items()))
            raise ConfigError(
                f"the pattern '{self.key_pattern}' matches {len(found)} modules, and classes_to_hook and "
                f"classes_to_skip leave none of them ({name!r} is a {type(part).__name__}); "
                "classes_to_skip=[] skips no class"
            )
        return chosen

    def _step_hooks(self, context: ProbingContext, matched: dict[str, nn.Module], probes: list[Any]) -> list[Hook]:
        hooks = []
        # Weights that a factory makes under the model's inference mode could never be trained.
        with torch.inference_mode(False):
            for direction in self._directions:
                for name, part in matched.items():
                    probes.append(_checked(self._probe_factory(name, direction), name))
                    site = Site(name, direction)
                    context.sites.append(site)
                    hooks.append(step_hook(context, part, site, probes[-1]))
        return hooks


def _checked(probe: Any, name: str) -> Any:
    if not callable(getattr(probe, "step", None)):
        raise ConfigError(
            f"probe_factory returned a {type(probe).__name__} for {name!r}; a probe has a method step(data, **kwargs)"
        )
    return probe


def _classes(what: str, given: Sequence[type[nn.Module]] | None, default: tuple[type, ...]) -> tuple[type, ...]:
    classes = default if given is None else tuple(given) if isinstance(given, Sequence) else (given,)
    for item in classes:
        if not isinstance(item, type):
            raise ConfigError(f"{what} holds module classes, got {item!r}")
    return classes
