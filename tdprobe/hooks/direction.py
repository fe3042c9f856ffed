"""The one table of hook directions: which torch hook, which named arguments, which value."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from tdprobe.errors import ConfigError, unknown

HookDirection = Literal["fwd", "fwd_kwargs", "fwd_pre", "fwd_pre_kwargs", "bwd", "bwd_pre"]


@dataclass(frozen=True)
class Direction:
    """Describe one direction.

    Attributes:
        name: The literal that users write.
        named: Names under which a callback receives what the torch hook receives.
        passed: Names of what torch passes, in order; a pre-hook is always told the keywords, because
            Hugging Face modules are often called with nothing else.
        read: The argument that caching and reading hooks take.
        written: The argument that setting hooks replace.
    """

    name: str
    named: tuple[str, ...]
    passed: tuple[str, ...]
    read: str
    written: str

    @property
    def is_backward(self) -> bool:
        """Whether gradients flow through it."""
        return self.name.startswith("bwd")

    @property
    def is_pre(self) -> bool:
        """Whether it comes before the module's own computation."""
        return "_pre" in self.name

    def register(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> RemovableHandle:
        """Register ``hook`` on ``module`` with the torch call of this direction."""
        if self.name == "bwd":
            return module.register_full_backward_hook(hook, prepend=first)
        if self.name == "bwd_pre":
            return module.register_full_backward_pre_hook(hook, prepend=first)
        if self.is_pre:
            return module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)
        return module.register_forward_hook(hook, prepend=first, with_kwargs=self.name == "fwd_kwargs")

    def named_arguments(self, passed: tuple[Any, ...]) -> dict[str, Any]:
        """Name what torch passed, keeping what this direction documents."""
        given = dict(zip(self.passed, passed, strict=True))
        return {name: given[name] for name in self.named}


DIRECTIONS: dict[str, Direction] = {
    d.name: d
    for d in (
        Direction("fwd", ("module", "args", "output"), ("module", "args", "output"), "output", "output"),
        Direction(
            "fwd_kwargs",
            ("module", "args", "kwargs", "output"),
            ("module", "args", "kwargs", "output"),
            "output",
            "output",
        ),
        Direction("fwd_pre", ("module", "args"), ("module", "args", "kwargs"), "args", "args"),
        Direction("fwd_pre_kwargs", ("module", "args", "kwargs"), ("module", "args", "kwargs"), "args", "args"),
        Direction(
            "bwd",
            ("module", "grad_input", "grad_output"),
            ("module", "grad_input", "grad_output"),
            "grad_output",
            "grad_input",
        ),
        Direction("bwd_pre", ("module", "grad_output"), ("module", "grad_output"), "grad_output", "grad_output"),
    )
}


def get_direction(name: str) -> Direction:
    """Look a direction up.

    Raises:
        ConfigError: ``name`` is not a direction.
    """
    try:
        return DIRECTIONS[name]
    except (KeyError, TypeError):
        raise ConfigError(unknown("hook direction", str(name), DIRECTIONS)) from None


def check_callback(callback: Callable[..., Any], direction: str, extra: tuple[str, ...] = ()) -> None:
    """Refuse a callback that cannot take the keywords of its direction.

    Args:
        callback: What the user passed.
        direction: Name of the direction.
        extra: Further keywords that this kind of hook passes; a callback may lack them in its signature
            only if it takes ``**kwargs``, and torch tells it when it is called.

    Raises:
        ConfigError: An argument is missing, or can only be given by position.
    """
    named = get_direction(direction).named
    parameters = _parameters(callback, direction)
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    if positional:
        raise ConfigError(
            f"the callback takes {', '.join(positional)} by position only; "
            f"a {direction!r} callback is called with keywords: {', '.join(named + extra)}"
        )
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    known = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL}
    missing = [name for name in named if name not in known]
    if missing:
        raise ConfigError(
            f"the callback lacks the argument(s) {', '.join(missing)}; "
            f"a {direction!r} callback is called with keywords: {', '.join(named + extra)} (or takes **kwargs)"
        )


def _parameters(callback: Callable[..., Any], direction: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(callback).parameters.values())
    except (TypeError, ValueError):
        raise ConfigError(
            f"the callback {callback!r} has no signature that can be read; a {direction!r} callback is a Python "
            f"function that takes {', '.join(get_direction(direction).named)} by keyword"
        ) from None
