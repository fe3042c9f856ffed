"""Hooks go on together, come off together, run in a documented order and stay out of copies."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tdprobe.hooks import DIRECTIONS, Hook, MultiHookHandle

X = torch.ones(1)


class Note:
    """A handle that says when it is removed, and may refuse."""

    def __init__(self, name: str, log: list[str], error: BaseException | None = None) -> None:
        self.name, self.log, self.error = name, log, error

    def remove(self) -> None:
        self.log.append(self.name)
        if self.error is not None:
            raise self.error


class Refuses(nn.Identity):
    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt


def adder(amount: float) -> Any:
    return lambda module, args, output: output + amount


def test_handles_are_removed_last_in_first_out() -> None:
    log: list[str] = []
    MultiHookHandle([Note("a", log), MultiHookHandle([Note("b", log), Note("c", log)]), Note("d", log)]).remove()
    assert log == ["d", "c", "b", "a"]


def test_a_handle_that_fails_to_go_does_not_keep_the_others() -> None:
    log: list[str] = []
    handles = MultiHookHandle(
        [Note("a", log), Note("b", log, ValueError("later")), Note("c", log, ValueError("stuck"))]
    )
    with pytest.raises(ValueError, match="stuck"):
        handles.remove()
    assert log == ["c", "b", "a"]


def test_the_error_of_an_installation_survives_a_handle_that_fails_to_go() -> None:
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        MultiHookHandle([Note("a", log), Note("b", log, ValueError("stuck")), Hook(Refuses(), "fwd_pre", print)])
    assert log == ["b", "a"]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("nested", [False, True])
def test_all_hooks_or_none(position: int, nested: bool, hooks_of: Any) -> None:
    parts = [nn.Identity(), nn.Identity()]
    parts.insert(position, Refuses())
    hooks: list[Any] = [Hook(part, "fwd_pre", lambda *_: None) for part in parts]
    with pytest.raises(KeyboardInterrupt):
        MultiHookHandle([MultiHookHandle(hooks[:2]), hooks[2]] if nested else hooks)
    assert sum(hooks_of(part) for part in parts) == 0


def test_removing_twice_and_installing_twice_change_nothing(hooks_of: Any) -> None:
    module, calls = nn.Identity(), []
    handle = MultiHookHandle([Hook(module, "fwd", lambda *_: calls.append(1))])
    handle.install()
    module(X)
    assert calls == [1] and hooks_of(module) == 1
    handle.remove()
    handle.remove()
    assert hooks_of(module) == 0
    handle.install()
    module(X)
    handle.remove()
    assert calls == [1, 1] and hooks_of(module) == 0


def test_foreign_handles_cannot_be_installed_again() -> None:
    module = nn.Identity()
    ours = MultiHookHandle([Hook(module, "fwd", lambda *_: None)])
    foreign = MultiHookHandle([ours, module.register_forward_hook(lambda *_: None)])
    assert ours.reinstallable and not foreign.reinstallable and len(foreign) == 2
    foreign.remove()


KINDS = ["user", "edit 1", "edit 2", "observer"]


@pytest.mark.parametrize("order", list(itertools.permutations(KINDS)), ids=lambda order: ", ".join(order))
def test_edits_come_first_in_their_own_order_whatever_was_installed_first(order: tuple[str, ...]) -> None:
    module, seen = nn.Identity(), {}
    installed = []
    for kind in order:
        look = lambda module, args, output, kind=kind: seen.__setitem__(kind, output.item())  # noqa: E731
        if kind == "user":
            installed.append(module.register_forward_hook(look))
        elif kind == "observer":
            installed.append(MultiHookHandle([Hook(module, "fwd", look)]))
        else:
            edit = (lambda m, a, y: y + 1) if kind == "edit 1" else (lambda m, a, y: y * 10)
            installed.append(MultiHookHandle([Hook(module, "fwd", edit, edits=True, order=int(kind[-1]))]))
    assert module(X).item() == 20
    assert seen == {"user": 20, "observer": 20}
    for handle in installed:
        handle.remove()
    assert module(X).item() == 1


def test_the_order_of_edits_survives_lifting_and_one_function_in_two_places() -> None:
    class Editor:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def edit(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * self.scale + 1

    module = nn.Identity()
    # Two bound methods share one function, so an order noted on the function would be that of the last.
    first = MultiHookHandle([Hook(module, "fwd", Editor(10).edit, edits=True, order=1)])
    second = MultiHookHandle([Hook(module, "fwd", Editor(2).edit, edits=True, order=2)])
    assert module(X).item() == (1 * 10 + 1) * 2 + 1
    first.remove()
    first.install()
    assert module(X).item() == (1 * 10 + 1) * 2 + 1
    second.remove()
    first.remove()


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copied_model_has_no_part_in_the_hooks_of_the_original(copied: Any, name: str) -> None:
    module, calls = nn.Linear(1, 1), []
    handle = MultiHookHandle([Hook(module, name, lambda *_: calls.append(1))])
    twin = copied(module)
    twin(X).sum().backward()
    assert calls == []
    module(X).sum().backward()
    assert calls == [1]
    handle.remove()
