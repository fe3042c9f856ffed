"""The table of directions: which torch hook, with which arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdprobe.hooks import DIRECTIONS, Hook, MultiHookHandle, check_callback, get_direction

TABLES = {
    "fwd": ("_forward_hooks", "_forward_hooks_with_kwargs"),
    "fwd_kwargs": ("_forward_hooks", "_forward_hooks_with_kwargs"),
    "fwd_pre": ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    "fwd_pre_kwargs": ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    "bwd": ("_backward_hooks", None),
    "bwd_pre": ("_backward_pre_hooks", None),
}


class Scaled(nn.Module):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_is_registered_in_its_table_and_taken_out(name: str) -> None:
    module = Scaled()
    hook = Hook(module, name, lambda *_: None)
    table, flags = TABLES[name]
    for _ in range(2):
        handle = MultiHookHandle([hook])
        assert len(getattr(module, table)) == 1
        if flags:
            assert len(getattr(module, flags)) == (name != "fwd")
        handle.remove()
        assert not getattr(module, table) and not (flags and getattr(module, flags))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_what_torch_passes_gets_the_documented_names(name: str) -> None:
    module, calls, x = Scaled(), [], torch.tensor([2.0], requires_grad=True)
    direction = get_direction(name)
    handle = MultiHookHandle([Hook(module, name, lambda *passed: calls.append(direction.named_arguments(passed)))])
    module(x, factor=5.0).backward()
    handle.remove()
    (given,) = calls
    expected: dict[str, Any] = {
        "module": module,
        "args": (x,),
        "kwargs": {"factor": 5.0},
        "output": torch.tensor([10.0]),
        "grad_input": (torch.tensor([5.0]),),
        "grad_output": (torch.tensor([1.0]),),
    }
    assert tuple(given) == direction.named
    for key, value in given.items():
        torch.testing.assert_close(value, expected[key]) if key != "module" else None
    assert given["module"] is module


def test_the_value_of_a_direction_is_its_documented_argument() -> None:
    assert {n: d.read for n, d in DIRECTIONS.items()} == {
        "fwd": "output",
        "fwd_kwargs": "output",
        "fwd_pre": "args",
        "fwd_pre_kwargs": "args",
        "bwd": "grad_output",
        "bwd_pre": "grad_output",
    }
    assert DIRECTIONS["bwd"].written == "grad_input"


@pytest.mark.parametrize("name", ["forward", "", None, ["fwd"], "FWD"])
def test_an_unknown_direction_lists_the_known_ones(name: Any) -> None:
    with pytest.raises(ValueError, match="unknown hook direction.*fwd_pre_kwargs"):
        get_direction(name)


class WithMethod:
    def method(self, module: Any, args: Any, output: Any) -> None: ...

    def __call__(self, *, module: Any, args: Any, output: Any, key: str = "") -> None: ...


@pytest.mark.parametrize(
    "callback",
    [
        lambda module, args, output: None,
        lambda *, output, args, module, more=1: None,
        lambda **everything: None,
        lambda output, **rest: None,
        WithMethod().method,
        WithMethod(),
        partial(lambda module, args, output, scale: None, scale=2),
    ],
)
def test_callbacks_that_take_the_keywords_are_accepted(callback: Any) -> None:
    check_callback(callback, "fwd")


@pytest.mark.parametrize(
    ("callback", "direction", "problem"),
    [
        (lambda module, args: None, "fwd", r"lacks the argument\(s\) output"),
        (lambda module: None, "fwd_pre_kwargs", r"lacks the argument\(s\) args, kwargs"),
        (lambda module, grad_output: None, "bwd", "grad_input"),
        (lambda module, /, args, output: None, "fwd", "takes module by position only"),
        (lambda *args: None, "fwd_pre", "module, args"),
        (print, "bwd_pre", "module, grad_output"),
        (torch.relu, "fwd", "module, args, output"),
        ("text", "fwd", "no signature"),
    ],
)
def test_callbacks_that_do_not_are_refused(callback: Any, direction: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_callback(callback, direction, ("key", "direction"))
