"""Which thread or task a hook listens to."""

from __future__ import annotations

import itertools
import threading
from contextvars import ContextVar

import torch

_OPEN: ContextVar[frozenset[int]] = ContextVar("tdprobe_open_gates", default=frozenset())
_numbers = itertools.count(1)


class Gate:
    """Let a hook act only in the thread or task that opened its context.

    Two threads that share one model would otherwise see each other's edits. A thread started inside a block
    does not belong to it unless it runs in a copy of the context (``contextvars.copy_context().run``).
    The number of a gate also tells the order in which contexts were entered.
    """

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = next(_numbers)

    def renew(self) -> None:
        """Take the next number: what is entered later comes later."""
        self.number = next(_numbers)

    def open(self) -> None:
        """Admit the running thread or task."""
        _OPEN.set(_OPEN.get() | {self.number})

    def close(self) -> None:
        """Admit the running thread or task no longer."""
        # Not ContextVar.reset: contexts may be left in any order, and a token would bring older gates back.
        _OPEN.set(_OPEN.get() - {self.number})

    def admits(self) -> bool:
        """Tell whether the running code belongs to this gate's context."""
        return self.number in _OPEN.get()

    def admits_backward(self) -> bool:
        """Like :meth:`admits`, for gradients: the engine's device threads belong to whoever called backward."""
        return self.admits() or isinstance(threading.current_thread(), threading._DummyThread)


def in_backward() -> bool:
    """Tell whether a backward pass is running, as when gradient checkpointing calls forward again."""
    return torch._C._current_graph_task_id() != -1
