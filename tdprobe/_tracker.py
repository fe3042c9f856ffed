"""Watch the forward passes of a model: where each begins, what its tokens are, where it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tdprobe.hooks import Gate, Hook
from tdprobe.stream.call import Call, CallReader


class CallTracker:
    """Keep the :class:`~tdprobe.stream.call.Call` of the running forward pass.

    Args:
        model: The model whose calls count.
        gate: Whose calls count.
        on_begin: Called with each call, before the model runs.
        on_end: Called with it after the model has run without an error.
    """

    def __init__(
        self,
        model: nn.Module,
        gate: Gate,
        on_begin: Callable[[Call], None] | None = None,
        on_end: Callable[[Call], None] | None = None,
    ) -> None:
        self.call: Call | None = None
        self._reader = CallReader(model)
        self._gate = gate
        self._on_begin = on_begin
        self._on_end = on_end
        self.hooks = [Hook(model, "fwd_pre", self._begin), Hook(model, "fwd", self._finish)]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._gate.admits():
            self.call = self._reader.read(args, kwargs)
            if self._on_begin is not None:
                self._on_begin(self.call)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._gate.admits():
            self.end()

    def end(self) -> None:
        """End the running forward pass, if there is one."""
        call, self.call = self.call, None
        if call is not None and self._on_end is not None:
            self._on_end(call)
