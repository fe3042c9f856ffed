"""A factory applied to one model: what is entered and left."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdprobe._types import UnraveledKey
from tdprobe.errors import StateError
from tdprobe.hooks import EarlyStop, Gate, Hook, MultiHookHandle
from tdprobe.hooks.compiled import recompiled
from tdprobe.hooks.handles import AddedHook
from tdprobe.hooks.sites import Site
from tdprobe.modules import HookedModule, NamedModule, user_model

if TYPE_CHECKING:
    from tdprobe.contexts import HookingContextFactory

InKeys = Sequence[UnraveledKey] | Mapping[str, UnraveledKey]


class HookingContext:
    """A factory applied to one model. Nothing is installed before it is entered.

    Args:
        factory: Where the configuration is.
        module: The user's model.
        in_keys: See :meth:`HookingContextFactory.prepare`.
        out_keys: See :meth:`HookingContextFactory.prepare`.
        pre_factories: Factories whose contexts are entered before this one, on the same model.

    Attributes:
        observes: Whether it may want to see a forward pass to its end, which no other context then ends early.
    """

    observes: bool = True

    def __init__(
        self,
        factory: HookingContextFactory,
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[UnraveledKey] | None = None,
        pre_factories: Sequence[HookingContextFactory] = (),
    ) -> None:
        self.factory = factory
        self._given = module
        self._pre_factories = list(pre_factories)
        if isinstance(module, TensorDictModuleBase):
            self._module, self._path = module, ""
        else:
            self._module, self._path = NamedModule(module, in_keys, out_keys), "module"
        self.gate = Gate(self.model, observes=self.observes)
        self.sites: list[Site] = []
        self._hooked: HookedModule | None = None
        self._handle: MultiHookHandle | None = None
        # Hooks that users set one by one.
        self._added = MultiHookHandle()
        self.in_call = False
        self._stack = ExitStack()
        self._managed = False
        self._lifted = False
        self._lifts = 0
        self._pending: set[int] | None = None

    @property
    def model(self) -> nn.Module:
        """The model whose submodule names are used, inside any wrapper."""
        return user_model(self._module)

    @property
    def in_context(self) -> bool:
        return self._hooked is not None

    @property
    def n_fired(self) -> dict[str, int]:
        """How often each place has acted, by module name (summed over directions)."""
        counts: dict[str, int] = {}
        for site in self.sites:
            counts[site.name] = counts.get(site.name, 0) + site.n_fired
        return counts

    def require_active(self, what: str) -> None:
        if self._hooked is None:
            raise StateError(f"cannot {what} outside of its context; use `with factory.prepare(model) as hooked:`")

    def __enter__(self) -> HookedModule:
        return self.enter(managed=True)

    def enter(self, *, managed: bool) -> HookedModule:
        """Install everything or nothing.

        Raises:
            StateError: The context is active already.
        """
        if self._hooked is not None:
            raise StateError("cannot enter a context twice; leave it first, or prepare another one")
        self._before_enter()
        self.gate.renew()
        with ExitStack() as stack:
            working = self._enter_before(stack)
            stack.enter_context(recompiled(self._module))
            keys = (list(self._module.in_keys), list(self._module.out_keys), self._path)
            prepared = self.factory._prepare_module(working, *keys)
            stack.callback(self.factory._restore_module, self._module, *keys)
            hooked = self.factory._spawn_hooked_module(prepared, self, self._path)
            self.sites, self._added = [], MultiHookHandle()
            self._handle = self.factory._hook_module(hooked)
            stack.callback(self._added.remove)
            self.gate.open()
            self._stack = stack.pop_all()
        self._hooked, self._managed, self._lifted, self._lifts = hooked, managed, False, 0
        return hooked

    def _enter_before(self, stack: ExitStack) -> TensorDictModuleBase:
        """Enter what comes before this context, and return the module to go on with."""
        working: TensorDictModuleBase = self._module
        for factory in self._pre_factories:
            working = stack.enter_context(factory.prepare(working))
        return working

    def add_hook(self, hook: Hook) -> AddedHook:
        """Install a hook that goes on and off with this context's own."""
        self.require_active("hook a module")
        return self._added.add(hook)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._leave(error)
        if error is None:
            self._check_fired()

    def _leave(self, error: BaseException | None = None) -> None:
        try:
            if self._handle is not None:
                self._handle.remove()
        finally:
            self._handle = None
            self._hooked = None
            # Their closures know this context, and would keep it alive.
            self._added = MultiHookHandle()
            self.gate.close()
            # Contexts entered before this one must know of the error, or their own checks would hide it.
            self._stack.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def restore(self) -> None:
        """Leave a context that no ``with`` block manages.

        Raises:
            StateError: The context is not active, or a ``with`` block will leave it.
        """
        self.require_active("restore the module")
        if self._managed:
            raise StateError("this context is managed by a `with` block, which restores the module at its end")
        self._leave()

    def _before_enter(self) -> None:
        """Make room for a new run; subclasses clear what they hold."""

    def _check_fired(self) -> None:
        if not self.factory.required or self._lifted or not self.sites:
            return
        silent = [site.name for site in self.sites if not site.n_fired]
        if len(silent) == len(self.sites):
            raise StateError(
                f"none of the {len(silent)} hooked modules ({', '.join(silent[:3])}"
                f"{', ...' if len(silent) > 3 else ''}) ran inside the block{self._other_reason()}, so there is no "
                "result. Call the hooked module, or the model that was prepared, in the thread that opened the block "
                "(a compiled or copied model is another one); required=False keeps silence."
            )
        if silent:
            warnings.warn(f"these hooked modules never ran inside the block: {', '.join(silent)}", stacklevel=3)

    def _other_reason(self) -> str:
        """Say why hooks may not have acted although their modules ran."""
        return ""

    # Calls in which nobody wants the output may end early.

    @contextmanager
    def calling(self) -> Generator[None]:
        """Mark a call of the hooked module, in which an early stop is allowed.

        Whoever calls the hooked module means its hooks, so the call belongs to the block in any thread.
        """
        elsewhere = not self.gate.admits()
        if elsewhere:
            self.gate.open()
        ends_early = self.factory.early_stop and self.gate.is_alone()
        self._pending = {id(site) for site in self.sites} if ends_early else None
        outermost, self.in_call = not self.in_call, True
        try:
            yield
        finally:
            self._pending = None
            self.in_call = not outermost
            if elsewhere:
                self.gate.close()

    def fired(self, site: Site) -> None:
        """Count one firing, and end the forward pass if it was the last that anybody waits for."""
        site.n_fired += 1
        if self._pending is not None:
            self._pending.discard(id(site))
            if not self._pending:
                raise EarlyStop

    def stopped_early(self) -> None:
        """Finish a forward pass that ended early; subclasses do what its end would have done."""

    @contextmanager
    def disable_hooks(self) -> Generator[None]:
        """Lift this context's hooks, and set them again afterwards.

        Raises:
            StateError: The context is not active.
        """
        if self._hooked is None or self._handle is None:
            raise StateError("cannot disable hooks outside of the context; call this within the block")
        hooked, handle, self._lifted = self._hooked, self._handle, True
        self._lifts += 1
        handle.remove()
        self._added.remove()
        try:
            yield
        finally:
            # The block may have ended meanwhile, and may even have been entered again.
            if self._hooked is hooked:
                self._lifts -= 1
                if not self._lifts:
                    self._set_again(hooked, handle)

    def _set_again(self, hooked: HookedModule, handle: MultiHookHandle) -> None:
        self._added.install()
        if handle.reinstallable:
            handle.install()
        else:
            self.sites = []
            self._handle = self.factory._hook_module(hooked)

    @contextmanager
    def disable(self) -> Generator[nn.Module]:
        """Lift the hooks and yield the module that was prepared."""
        with self.disable_hooks():
            yield self._given
