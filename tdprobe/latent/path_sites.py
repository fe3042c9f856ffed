"""What patching, steering and addition share: modules named by path, tokens named by a clause."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from tdprobe._tracker import CallTracker
from tdprobe.contexts import HookingContext, HookingContextFactory, Site
from tdprobe.errors import ConfigError, MissingKeyError, StateError
from tdprobe.hooks import EarlyStop, Hook, MultiHookHandle, first_tensor
from tdprobe.hooks.gate import in_backward
from tdprobe.hooks.match import runs
from tdprobe.hooks.paths import parse_path, resolve_path
from tdprobe.modules import HookedModule
from tdprobe.stream.call import Call
from tdprobe.stream.tokens import Selection, TokenClause

Key = str | tuple[str, ...]
REMEMBERED_CALLS = 64


def modules_at(root: nn.Module, paths: Sequence[str], *, required: bool = True) -> dict[str, nn.Module]:
    """Find the modules that paths lead to; a slice leads to several.

    Args:
        root: Where paths start.
        paths: See :func:`tdprobe.hooks.paths.parse_path`.
        required: Refuse a path that leads nowhere; otherwise it is left out.

    Raises:
        ConfigError: A path is malformed, leads nowhere or to a module that never runs, or two lead to the same module.
    """
    found: dict[str, nn.Module] = {}
    names: dict[int, str] = {}
    for path in paths:
        parse_path(path)
        try:
            reached = resolve_path(root, path)
        except ConfigError:
            if required:
                raise
            continue
        for name, module in reached.items():
            if not runs(module) and "forward" not in vars(module):
                raise ConfigError(
                    f"the module path '{path}' leads to a {type(module).__name__}, which never runs; "
                    f"'{path}[:]' takes the modules in it"
                )
            if names.setdefault(id(module), name) != name:
                raise ConfigError(
                    f"the module paths '{names[id(module)]}' and '{name}' lead to the same module; name it once"
                )
            found[name] = module
    if required and not found:
        raise ConfigError("no module is named: the list of module paths is empty")
    return found


def tensor_at(output: Any, site: Site) -> Tensor:
    """Return the tensor of a module's output that is read and written.

    Raises:
        StateError: There is none.
    """
    found = first_tensor(output)
    if not isinstance(found, Tensor):
        raise StateError(
            f"{site.name!r} gave a {type(output).__name__} without any tensor; name a module that gives one"
        )
    return found


def as_path(key: Key) -> tuple[str, ...]:
    """Return a key as a tuple of strings."""
    return (key,) if isinstance(key, str) else tuple(key)


def as_inputs(given: Any) -> tuple[Any, ...]:
    """Return the positional arguments of a call: a tuple as it is, anything else as the only one."""
    return given if type(given) is tuple else (given,)


def part_of(td: TensorDictBase, key: Key, need: str) -> TensorDictBase:
    """Take the inputs under ``key`` as a TensorDict of its own, with one batch dimension or none.

    Args:
        td: The caller's.
        key: Where the inputs are.
        need: Why they are needed, for the message.

    Raises:
        MissingKeyError: There are none.
    """
    part = td.get(key, None)
    if not is_tensor_collection(part):
        present = ", ".join(map(repr, td.keys(include_nested=True, leaves_only=True)))
        raise MissingKeyError(
            f"{need}, and the TensorDict has no {key!r} with inputs below it; it has {present or 'no key'}"
        )
    return flattened(part, td.batch_size)


def flattened(td: TensorDictBase, batch_size: torch.Size) -> TensorDictBase:
    """Copy a TensorDict, but not its tensors, with several batch dimensions as one."""
    copied = td.copy()
    copied.batch_size = batch_size
    return copied.flatten() if len(batch_size) > 1 else copied


class PathContext(HookingContext):
    """A context whose modules are named by path: each of them has to act."""

    observes = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tracker = CallTracker(self.model, self.gate, self._begin)
        self.ends_early = self.factory.early_stop
        # What a backward pass may compute again under gradient checkpointing, when no call is running any more.
        self._selections: deque[Selection] = deque(maxlen=REMEMBERED_CALLS)
        self._computed_again = False

    @property
    def clause(self) -> TokenClause | None:
        """Which tokens are meant; ``None``: whole values."""
        factory: Any = self.factory
        return factory.clause

    @property
    def acts(self) -> bool:
        """Whether the running forward pass is this block's, or one of this block's that a backward pass repeats."""
        return self.gate.admits() or (in_backward() and self.gate.admits_backward())

    def _begin(self, call: Call) -> None:
        if self.clause is None or in_backward():
            return
        if self._computed_again:
            self._selections.clear()
            self._computed_again = False
        if torch.is_grad_enabled():
            self._selections.append(self.clause.select(call))

    def selection(self) -> Selection:
        """Return the tokens that the clause selects in the running forward pass.

        Raises:
            StateError: Which pass is running cannot be told.
        """
        if self.tracker.call is not None and self.clause is not None:
            return self.clause.select(self.tracker.call)
        if not in_backward():
            raise StateError(
                "tokens are selected by the inputs of the prepared model, and a module of it was called on its own; "
                "prepare that module instead, or drop tokens="
            )
        self._computed_again = True
        found = list(self._selections)
        if not found or any(not _same(found[0], other) for other in found[1:]):
            raise StateError(
                f"gradient checkpointing repeats one of {len(found)} forward passes, whose selected tokens differ; "
                "call backward after each of them"
            )
        return found[0]

    def seen(self, site: Site) -> None:
        """Note that a module has run, in a pass that ends once all have."""
        if self._pending is not None:
            self._pending.discard(id(site))
            if not self._pending:
                raise EarlyStop

    @contextmanager
    def calling(self) -> Generator[None]:
        """Mark a call of the hooked module, which may end early in a run whose output nobody wants."""
        with super().calling():
            ends_early = self.ends_early and self.gate.is_alone()
            self._pending = {id(site) for site in self.sites} if ends_early else None
            yield

    def stopped_early(self) -> None:
        """End the forward pass as its end would have done."""
        self.tracker.end()

    def _check_fired(self) -> None:
        silent = [site.name for site in self.sites if not site.n_fired]
        if silent and self.factory.required and not self._lifted:
            clause = "" if self.clause is None else f", or tokens={self.clause.tokens!r} selected nothing"
            raise StateError(
                f"nothing was done at {', '.join(map(repr, silent))}: the module never ran inside the block{clause}. "
                "Call the hooked module, or the model that was prepared, in the thread that opened the block; "
                "required=False keeps silence."
            )


def _same(a: Selection, b: Selection) -> bool:
    if a.shape != b.shape or (a.index is None) != (b.index is None):
        return False
    return a.index is None or b.index is None or torch.equal(a.index.cpu(), b.index.cpu())


class PathFactory(HookingContextFactory):
    """Base of the factories that name modules by path.

    Args:
        paths: Module paths from the user's model.
        tokens: Which tokens of each row; ``None``: whole values.
        skip_first: Real tokens at the start of each row that never count.
        required: A path that leads nowhere, or a module that never acts, are errors.
    """

    _hooking_context_class: type[HookingContext] = PathContext

    def __init__(self, paths: Sequence[str], *, tokens: Any, skip_first: int, required: bool) -> None:
        super().__init__()
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        selects = tokens is not None or skip_first
        self.clause = TokenClause("all" if tokens is None else tokens, skip_first) if selects else None
        self.required = required

    def _site_hook(self, context: Any, module: nn.Module, site: Site) -> Hook:
        raise NotImplementedError

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context: PathContext = module.hooking_context
        found = modules_at(context.model, self.paths, required=self.required)
        context.sites = [Site(name) for name in found]
        places = zip(found.values(), context.sites, strict=True)
        hooks = [self._site_hook(context, place, site) for place, site in places]
        begin, end = context.tracker.hooks
        return MultiHookHandle([begin, *hooks, end] if self._needs_calls() else hooks)

    def _needs_calls(self) -> bool:
        return self.clause is not None
