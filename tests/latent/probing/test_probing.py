from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probing_tools import KEYS, Net, Recorder, X, Y, accuracy, batch, linear_manager, net
from tdprobe.latent import Probing


@pytest.mark.parametrize(
    ("pattern", "options", "names"),
    [
        ("", {}, ["first", "act", "blocks.0", "blocks.1"]),
        ("blocks", {}, ["blocks.0", "blocks.1"]),
        ("", {"classes_to_hook": [nn.Linear]}, ["first", "blocks.0", "blocks.1"]),
        ("", {"classes_to_skip": [nn.Linear]}, ["act", "blocks"]),
        ("", {"classes_to_skip": []}, ["first", "act", "blocks", "blocks.0", "blocks.1"]),
        (r"td_module\.module\.first", {"relative": False}, ["td_module.module.first"]),
    ],
)
def test_modules_are_chosen_by_pattern_and_class(pattern: str, options: Any, names: list[str]) -> None:
    recorder = Recorder()
    with Probing(pattern, recorder, **options).prepare(net()) as hooked:
        assert [name for name, _ in recorder.made] == names
        hooked(X)
    assert sorted(recorder.names) == sorted(names)
    assert all(items == {} for *_, items in recorder.steps)


def test_one_probe_per_module_and_direction_also_when_hooks_are_lifted() -> None:
    recorder = Recorder()
    context = Probing("first", recorder, directions=["fwd", "fwd_pre"]).prepare(net())
    assert not recorder.made
    with context as hooked:
        assert recorder.made == [("first", "fwd"), ("first", "fwd_pre")]
        with hooked.disable_context_hooks():
            hooked(X)
        assert not recorder.steps
        hooked(X)
        assert len(recorder.steps) == 2
    assert len(recorder.made) == 2
    with context as hooked:
        assert len(recorder.made) == 4
        hooked(X)


@pytest.mark.parametrize(
    ("pattern", "options", "problem"),
    [
        ("frist", {}, r"'frist' matches no module of Net.*'first'"),
        ("first", {"classes_to_hook": [nn.ReLU]}, "leave none of them .'first' is a Linear"),
        ("blocks$", {}, "classes_to_skip"),
    ],
)
def test_hooking_nothing_is_an_error(pattern: str, options: Any, problem: str, hooks_of: Any) -> None:
    model, recorder = net(), Recorder()
    with pytest.raises(ValueError, match=problem), Probing(pattern, recorder, **options).prepare(model):
        pass
    assert hooks_of(model) == 0 and not recorder.made
    with Probing(pattern, recorder, required=False, **options).prepare(model) as hooked:
        hooked(X)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"probe_factory": 3}, "probe_factory"),
        ({"directions": ["forward"]}, "unknown hook direction 'forward'"),
        ({"additional_keys": [3]}, "additional_keys"),
        ({"classes_to_hook": ["Linear"]}, "classes_to_hook"),
        ({"tokens": "lst"}, "did you mean 'last'"),
        ({"tokens": "last", "directions": ["bwd"]}, "tokens"),
        ({"early_stop": True, "directions": ["bwd"]}, "early_stop"),
        ({"key_pattern": 3}, "regular expression"),
    ],
)
def test_a_bad_argument_is_refused_at_construction(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Probing(**({"key_pattern": "first", "probe_factory": Recorder()} | options))


def test_a_bad_pattern_is_refused_at_construction_and_by_the_property() -> None:
    with pytest.raises(re.error):
        Probing("(", Recorder())
    factory = Probing("first", Recorder())
    with pytest.raises(re.error):
        factory.key_pattern = "("
    factory.key_pattern = "act"
    assert factory.key_pattern == "act"


def test_a_probe_has_a_step() -> None:
    context = Probing("first", lambda name, direction: nn.Linear).prepare(net())
    with pytest.raises(ValueError, match="for 'first'.*step"), context:
        pass


# What a probe gets.


def test_data_of_every_direction() -> None:
    model, recorder = net(), Recorder()
    directions = ["fwd", "fwd_kwargs", "fwd_pre", "fwd_pre_kwargs", "bwd", "bwd_pre"]
    x = X.clone().requires_grad_()
    with Probing("first", recorder, directions=directions).prepare(model) as hooked:
        out = hooked(x)
        out.sum().backward()
    data = {direction: value for _, direction, value, _ in recorder.steps}
    hidden = model.first(X)
    open_ = (hidden > 0).float()
    grad_output = torch.ones(2, 2) @ model.blocks[1].weight @ model.blocks[0].weight * open_
    for direction in ("fwd", "fwd_kwargs"):
        assert torch.equal(data[direction], hidden)
    for direction in ("fwd_pre", "fwd_pre_kwargs"):
        assert isinstance(data[direction], tuple) and torch.equal(data[direction][0], X)
    torch.testing.assert_close(data["bwd_pre"], (grad_output,))
    torch.testing.assert_close(data["bwd"], (grad_output @ model.first.weight,))


class Keywords(nn.Module):
    """Calls its layer by keyword only, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, input: Tensor) -> tuple[None, Tensor]:
        return None, self.layer(input=input)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Keywords()

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(input)[1]


def test_a_module_called_by_keywords_gives_their_values() -> None:
    recorder = Recorder()
    with Probing("inner.layer", recorder, directions=["fwd_pre"]).prepare(Outer()) as hooked:
        hooked(X)
    assert torch.equal(recorder.steps[0][2][0], X)


def test_of_a_tuple_the_first_tensor_is_probed() -> None:
    model, manager = Outer(), linear_manager()
    with Probing("inner$", manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
        hooked(batch())
    expected = manager.estimators["inner_fwd"].predict(model.inner.layer(X))
    assert manager.fit_metrics["inner_fwd"] == accuracy(expected, Y)


def test_a_module_that_runs_twice_steps_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, input: Tensor) -> Tensor:
            return self.layer(self.layer(input))

    model, recorder = Twice(), Recorder()
    with Probing("layer", recorder).prepare(model) as hooked:
        hooked(X)
        assert hooked.hooking_context.n_fired == {"layer": 2}
    once = model.layer(X)
    torch.testing.assert_close([data for *_, data, _ in recorder.steps], [once, model.layer(once)])


def test_recomputation_under_checkpointing_does_not_step_again() -> None:
    class Checkpointed(Net):
        def forward(self, input: Tensor) -> Tensor:
            return checkpoint(super().forward, input, use_reentrant=False)

    recorder = Recorder()
    with Probing("first", recorder, additional_keys=["labels"]).prepare(Checkpointed()) as hooked:
        hooked(batch())["output"].sum().backward()
    assert len(recorder.steps) == 1
