"""Hooks that go on all together, come off all together, and run in a documented order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from tdprobe.hooks.compiled import stay_out_of_graphs
from tdprobe.hooks.direction import get_direction


class EarlyStop(BaseException):
    """End a forward pass once everything that was asked for has been seen.

    Not an ``Exception``: model code that catches those must not swallow it.
    """


class Handle(Protocol):
    """Anything that can be removed."""

    def remove(self) -> None:
        """Remove it."""
        ...


class Hook:
    """One hook on one module, which can be installed again after removal.

    Args:
        module: Where.
        direction: One of the six directions.
        call: The function that torch calls.
        edits: Interventions run before every other hook on the module, in the order in which their contexts were
            entered; observers run after what is there when they are installed. So an observer sees the steered value
            whichever came first, and so does a capture that transformers installed before us.
        order: Place among the interventions.
    """

    def __init__(
        self,
        module: nn.Module,
        direction: str,
        call: Callable[..., Any],
        *,
        edits: bool = False,
        order: int = 0,
    ) -> None:
        self.module = module
        self.direction = get_direction(direction)
        self.call = call
        self.edits = edits
        self.order = order
        self._handle: RemovableHandle | None = None

    def install(self) -> None:
        """Install the hook, if it is not installed."""
        if self._handle is not None:
            return
        order = self.order if self.edits else None
        self._handle = self.direction.register(self.module, _Installed(self.call, order), first=self.edits)
        if self.edits:
            _sort_edits(self._handle.hooks_dict_ref())

    def remove(self) -> None:
        """Remove the hook, if it is installed."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Installed:
    """What stands in torch's table: the hook here, nothing in a copy of the model.

    A copied or saved model must neither write into this block's results nor carry them along.
    """

    __slots__ = ("call", "order")

    def __init__(self, call: Callable[..., Any], order: int | None) -> None:
        self.call = call
        self.order = order

    def __call__(self, *passed: Any) -> Any:
        return self.call(*passed)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        return (_get_inert, ())


stay_out_of_graphs(_Installed.__call__)


def inert(*passed: Any) -> None:
    """Do nothing, where a copy of a model has the hook of the original."""


def _get_inert() -> Callable[..., None]:
    return inert


def _sort_edits(hooks: OrderedDict[int, Any] | None) -> None:
    if hooks is None:
        return
    ours = {key: hook.order for key, hook in hooks.items() if isinstance(hook, _Installed) and hook.order is not None}
    for key in sorted(ours, key=lambda key: (ours[key], key), reverse=True):
        hooks.move_to_end(key, last=False)


class AddedHook:
    """Take one hook off for good, while others stay.

    Args:
        among: The hooks that it is lifted and set again with.
        hook: The hook.
    """

    def __init__(self, among: list[Handle], hook: Hook) -> None:
        self._among = among
        self._hook = hook

    def remove(self) -> None:
        """Remove the hook; a second time does nothing."""
        self._hook.remove()
        if self._hook in self._among:
            self._among.remove(self._hook)


class MultiHookHandle:
    """Many handles as one; removed last in, first out.

    Args:
        handles: Anything with ``remove()``. Hooks of tdprobe are installed here, all or none.
    """

    def __init__(self, handles: Iterable[Handle] = ()) -> None:
        self._handles = list(handles)
        self.install()

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[Handle]:
        return iter(self._handles)

    def add(self, hook: Hook) -> AddedHook:
        """Install one more hook, and return what takes it off again."""
        hook.install()
        self._handles.append(hook)
        return AddedHook(self._handles, hook)

    def install(self) -> None:
        """Install every hook that is not installed; on any error remove them all and re-raise."""
        try:
            for handle in self._handles:
                if isinstance(handle, (Hook, MultiHookHandle)):
                    handle.install()
        except BaseException as error:
            try:
                self.remove()
            except BaseException as second:
                error.add_note(f"and a hook could not be removed: {second!r}")
            raise

    def remove(self) -> None:
        """Remove every hook; one that fails does not keep the others."""
        errors: list[BaseException] = []
        for handle in reversed(self._handles):
            try:
                handle.remove()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]

    @property
    def reinstallable(self) -> bool:
        """Whether every part can be installed again after removal (foreign handles cannot)."""
        return all(isinstance(h, Hook) or (isinstance(h, MultiHookHandle) and h.reinstallable) for h in self._handles)
