"""Hooks that never fire, contexts on top of each other, and whose calls they listen to."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

from context_tools import Editing, X, chain, values
from tdprobe.errors import TdprobeError
from tdprobe.latent import ActivationCaching, LayerScoring, SteeringVectors


def test_hooks_that_never_fire_are_an_error(hooks_of: Any) -> None:
    model = chain()
    with pytest.raises(RuntimeError, match=r"none of the 3 hooked modules \(0, 1, 2\) ran") as caught:
        with ActivationCaching("").prepare(model):
            copy.deepcopy(model)(X)
    assert isinstance(caught.value, TdprobeError) and hooks_of(model) == 0
    with ActivationCaching("", required=False).prepare(model) as hooked:
        pass
    assert hooked.hooking_context.n_fired == {"0": 0, "1": 0, "2": 0}


def test_some_hooks_that_never_fire_are_a_warning() -> None:
    model = chain()
    with pytest.warns(UserWarning, match="never ran inside the block: 1, 2"):
        with ActivationCaching("").prepare(model) as hooked:
            model[0](X)
    assert hooked.hooking_context.n_fired == {"0": 1, "1": 0, "2": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ActivationCaching("", required=False).prepare(model):
            model[0](X)


# Stacked contexts.


@pytest.mark.parametrize("prepared_first", ["edit", "cache"])
@pytest.mark.parametrize("entered_first", ["edit", "cache"])
def test_an_observer_sees_the_edit_whichever_came_first(prepared_first: str, entered_first: str) -> None:
    model = chain()
    factories = {"edit": Editing("0", lambda y: y * 10), "cache": ActivationCaching("")}
    contexts = {name: factories[name].prepare(model) for name in sorted(factories, key=prepared_first.__ne__)}
    with ExitStack() as stack:
        for name in sorted(contexts, key=entered_first.__ne__):
            stack.enter_context(contexts[name])
        assert model(X).tolist() == [[-21, -21]]
    assert values(contexts["cache"]) == {"0": 20, "1": 21, "2": -21}


@pytest.mark.parametrize("prepared", ["add", "double"])
@pytest.mark.parametrize(("entered", "result"), [("add", (2 + 18) * 2 + 1), ("double", 2 * 2 + 18 + 1)])
def test_edits_run_in_the_order_of_entering(prepared: str, entered: str, result: float) -> None:
    model = chain()
    factories = {"add": Editing("0", lambda y: y + 18), "double": Editing("0", lambda y: y * 2)}
    contexts = {name: factories[name].prepare(model) for name in sorted(factories, key=prepared.__ne__)}
    first, second = sorted(contexts, key=entered.__ne__)
    with contexts[first], contexts[second]:
        assert -model(X)[0, 0] == result
        with contexts[first].disable_hooks():
            model(X)
        assert -model(X)[0, 0] == result


def test_a_users_hooks_survive_and_see_the_edit(hooks_of: Any) -> None:
    model, seen = chain(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output[0, 0].item()))
    with Editing("0", lambda y: y * 10).prepare(model) as hooked, ActivationCaching("0").prepare(model):
        hooked(X)
    model(X)
    assert seen == [20, 2] and hooks_of(model) == 1


# Threads and tasks.


def test_two_threads_on_one_model_do_not_see_each_other() -> None:
    model, barrier, found = chain(), threading.Barrier(2), {}

    def work(scale: int) -> None:
        edit, cache = Editing("0", lambda y: y * scale).prepare(model), ActivationCaching("").prepare(model)
        with edit, cache as hooked:
            barrier.wait(5)
            outs = {hooked(X)[0, 0].item() for _ in range(20)}
            barrier.wait(5)
        found[scale] = outs, values(cache), cache.n_fired

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (10, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for scale in (10, 100):
        outs, cached, fired = found[scale]
        assert outs == {-(2 * scale + 1)} and cached == {
            "0": 2 * scale,
            "1": 2 * scale + 1,
            "2": -2 * scale - 1,
        }
        assert fired == {"0": 20, "1": 20, "2": 20}


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(20)
    return found[0]


def test_a_thread_started_inside_belongs_to_the_block_only_if_it_says_so() -> None:
    model = chain()
    with Editing("0", lambda y: y * 10).prepare(model) as hooked:
        inside = contextvars.copy_context()
        assert in_thread(lambda: model(X)[0, 0].item()) == -3
        assert in_thread(lambda: inside.run(lambda: model(X))[0, 0].item()) == -21
        # Who calls the hooked module means its hooks, wherever the call is made.
        assert in_thread(lambda: hooked(X)[0, 0].item()) == -21
        assert in_thread(lambda: model(X)[0, 0].item()) == -3


def test_tasks_on_one_model_do_not_see_each_other() -> None:
    model = chain()

    async def work(scale: int) -> tuple[set[float], dict[str, float]]:
        outs = set()
        with (
            Editing("0", lambda y: y * scale).prepare(model),
            ActivationCaching("1").prepare(model) as hooked,
        ):
            for _ in range(5):
                await asyncio.sleep(0)
                outs.add(model(X)[0, 0].item())
        return outs, values(hooked.hooking_context)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(work(scale) for scale in (1, 10, 100)))

    for scale, (outs, cached) in zip((1, 10, 100), asyncio.run(all_of_them()), strict=True):
        assert outs == {-(2 * scale + 1)} and cached == {"1": 2 * scale + 1}


def test_a_block_may_end_in_another_task_than_it_began(hooks_of: Any) -> None:
    model = chain()

    def fixture() -> Iterator[None]:
        with ActivationCaching("0").prepare(model):
            model(X)
            yield

    steps = fixture()
    contextvars.copy_context().run(next, steps)
    assert contextvars.copy_context().run(lambda: list(steps)) == []
    assert hooks_of(model) == 0


# Keys.


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"in_keys": ["z"]}, "'z' is not among the in_keys of the module: 'x'"),
        ({"out_keys": ["z"]}, "'z' is not among the out_keys"),
        ({"in_keys": [3]}, "strings or flat tuples of strings, got 3"),
        ({"out_keys": [("a", ("b",))]}, "strings or flat tuples"),
    ],
)
def test_keys_given_for_a_tensordict_module_are_checked(keys: Any, problem: str) -> None:
    wrapped = TensorDictModule(chain(), ["x"], ["y"])
    with pytest.raises(ValueError, match=problem):
        ActivationCaching("").prepare(wrapped, **keys)
    assert ActivationCaching("").prepare(wrapped, in_keys=["x"], out_keys=["y"]).model is wrapped


@pytest.mark.parametrize("thing", ["a model", None, 3])
def test_only_modules_can_be_prepared(thing: Any) -> None:
    with pytest.raises(ValueError, match=r"nn\.Module"):
        ActivationCaching("").prepare(thing)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("first", ["stopping", "scoring"])
def test_an_early_stop_does_not_cut_off_another_observer(first: str, part: bool) -> None:
    """A scoring would lose the rows of that pass, and nobody would notice."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(inner)
    scoring = LayerScoring(r"\d" if part else r"0\.\d").prepare(inner if part else model)
    stopping = ActivationCaching(r"0\.0", early_stop=True).prepare(model)
    pair = [stopping, scoring] if first == "stopping" else [scoring, stopping]
    x = torch.ones(9, 4)
    with torch.no_grad(), pair[0], pair[1]:
        for _ in range(2):
            output = stopping._hooked(x)
            assert torch.equal(output, model(x))
    assert scoring.n_rows == 36
    with torch.no_grad(), stopping as hooked:
        assert hooked(x) is None


def test_an_early_stop_holds_beside_steering() -> None:
    model, later = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), []
    model[2].register_forward_hook(lambda *_: later.append(1))
    stopping = ActivationCaching("1", early_stop=True).prepare(model)
    with torch.no_grad(), SteeringVectors(["0"], vector=torch.ones(4)).prepare(model), stopping as hooked:
        hooked(torch.ones(2, 4))
    assert not later
    with torch.no_grad():
        torch.testing.assert_close(stopping.cache["1"], model[1](model[0](torch.ones(2, 4)) + 1))
