"""Whose calls a hook listens to."""

from __future__ import annotations

import contextvars
import threading

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tdprobe.hooks import Gate
from tdprobe.hooks.gate import in_backward


def test_a_gate_admits_between_open_and_close() -> None:
    gate = Gate()
    assert not gate.admits()
    gate.open()
    assert gate.admits()
    gate.close()
    assert not gate.admits()


def test_gates_close_in_any_order() -> None:
    first, second, third = Gate(), Gate(), Gate()
    for gate in (first, second, third):
        gate.open()
    for gate, left in ((first, [False, True, True]), (third, [False, True, False]), (second, [False] * 3)):
        gate.close()
        assert [g.admits() for g in (first, second, third)] == left


def test_a_gate_is_closed_to_other_threads_and_contexts() -> None:
    gate, seen = Gate(), {}
    before = contextvars.copy_context()
    gate.open()
    inside = contextvars.copy_context()
    thread = threading.Thread(target=lambda: seen.update(plain=gate.admits(), copied=inside.run(gate.admits)))
    thread.start()
    thread.join(5)
    assert seen == {"plain": False, "copied": True}
    assert not before.run(gate.admits)
    gate.close()


def test_later_gates_have_higher_numbers() -> None:
    first, second = Gate(), Gate()
    assert first.number < second.number
    first.renew()
    assert first.number > second.number


def test_a_forward_pass_inside_backward_is_told_from_an_ordinary_one() -> None:
    layer, seen = nn.Linear(1, 1), []
    layer.register_forward_pre_hook(lambda *_: seen.append(in_backward()))
    checkpoint(layer, torch.ones(1, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True] and not in_backward()
