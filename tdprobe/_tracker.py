"""Watch the forward passes of a model: where each begins, what its tokens are, where it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from torch import nn

from tdprobe.hooks import Gate, Hook
from tdprobe.stream.call import Call, CallReader


class CallTracker:
    """Keep the :class:`~tdprobe.stream.call.Call` of the running forward pass.

    Args:
        model: The model whose calls count.
        gate: Whose calls count.
        on_begin: Method that is called with each call, before the model runs; its owner is not kept alive.
        on_end: Method that is called with it after the model has run without an error.
    """

    def __init__(
        self,
        model: nn.Module,
        gate: Gate,
        on_begin: Callable[[Call], None] | None = None,
        on_end: Callable[[Call], None] | None = None,
    ) -> None:
        self.call: Call | None = None
        self._model = model
        self._reader = CallReader(model)
        self._gate = gate
        # The owner keeps this tracker: were each to keep the other, what the owner holds would wait for the collector.
        self._on_begin = None if on_begin is None else WeakMethod(on_begin)
        self._on_end = None if on_end is None else WeakMethod(on_end)

    @property
    def hooks(self) -> list[Hook]:
        """The hooks that begin and end a call."""
        return [Hook(self._model, "fwd_pre", self._begin), Hook(self._model, "fwd", self._finish)]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._gate.admits():
            self.call = self._reader.read(args, kwargs)
            _tell(self._on_begin, self.call)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._gate.admits():
            self.end()

    def end(self) -> None:
        """End the running forward pass, if there is one."""
        call, self.call = self.call, None
        if call is not None:
            _tell(self._on_end, call)


def _tell(method: WeakMethod[Callable[[Call], None]] | None, call: Call) -> None:
    target = None if method is None else method()
    if target is not None:
        target(call)
