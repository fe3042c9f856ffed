"""Which thread or task a hook listens to."""

from __future__ import annotations

import itertools
import threading
from contextvars import ContextVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from tdprobe.hooks.match import walk

_OPEN: ContextVar[frozenset[int]] = ContextVar("tdprobe_open_gates", default=frozenset())
_numbers = itertools.count(1)
_gates: WeakValueDictionary[int, Gate] = WeakValueDictionary()


class Gate:
    """Let a hook act only in the thread or task that opened its context.

    Two threads that share one model would otherwise see each other's edits. A thread started inside a block
    does not belong to it unless it runs in a copy of the context (``contextvars.copy_context().run``).
    The number of a gate also tells the order in which contexts were entered.

    Args:
        model: What the context listens to.
        observes: Whether it may want to see a forward pass to its end.
    """

    __slots__ = ("__weakref__", "model", "number", "observes")

    def __init__(self, model: nn.Module | None = None, *, observes: bool = True) -> None:
        self.model = model
        self.observes = observes
        self.number = 0
        self.renew()

    def renew(self) -> None:
        """Take the next number: what is entered later comes later."""
        _gates.pop(self.number, None)
        self.number = next(_numbers)
        _gates[self.number] = self

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

    def is_alone(self) -> bool:
        """Tell whether no other context of the running code observes the same model, or a part or whole of it."""
        others = [_gates.get(number) for number in _OPEN.get() - {self.number}]
        models = [other.model for other in others if other is not None and other.observes and other.model is not None]
        if not models or self.model is None:
            return True
        mine = {id(part) for _, part in walk(self.model)}
        return not any(id(part) in mine for model in models for _, part in walk(model))

    def admits_backward(self) -> bool:
        """Like :meth:`admits`, for gradients: the engine's device threads belong to whoever called backward."""
        return self.admits() or isinstance(threading.current_thread(), threading._DummyThread)


def in_backward() -> bool:
    """Tell whether a backward pass is running, as when gradient checkpointing calls forward again."""
    return torch._C._current_graph_task_id() != -1
