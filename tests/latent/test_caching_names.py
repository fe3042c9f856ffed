"""Which modules are cached under which names, and what happens to models and factories that are copied."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from caching_tools import HIDDEN, OUT, Two, X, run
from tdprobe.latent import ActivationCaching


@pytest.mark.parametrize(("nested", "directions"), [(True, ["fwd"]), (False, ["fwd", "bwd"])])
def test_keys_carry_the_direction_when_asked_or_when_there_are_several(nested: bool, directions: Any) -> None:
    factory = ActivationCaching("linear1", use_nested_keys=nested, directions=directions)
    with factory.prepare(Two()) as hooked:
        hooked(X).sum().backward()
    cache = hooked.hooking_context.cache
    assert set(cache.keys(include_nested=True, leaves_only=True)) == {(d, "linear1") for d in directions}
    assert torch.equal(cache["fwd", "linear1"], HIDDEN)


def test_dots_of_a_name_stay_in_one_flat_key() -> None:
    model = nn.Sequential(nn.Sequential(Two()))
    assert set(run(ActivationCaching(r"0\.0\.lin"), model).keys()) == {"0.0.linear1", "0.0.linear2"}


@pytest.mark.parametrize("key", ["run", ("runs", "first")])
def test_cache_key_hands_the_cache_out_with_the_outputs(key: Any) -> None:
    with ActivationCaching("linear", cache_key=key).prepare(Two()) as hooked:
        td = TensorDict({"input": X}, batch_size=[2])
        assert hooked(td) is td
        assert hooked.out_keys == ["output", key]
        # A later call leaves what an earlier one got alone, and a tensor still gives a tensor.
        assert torch.equal(hooked(3 * X), 3 * OUT)
    assert torch.equal(td[key]["linear1"], HIDDEN) and torch.equal(td[key]["linear2"], OUT)
    assert torch.equal(hooked.hooking_context.cache["linear1"], 3 * HIDDEN)


def test_without_a_cache_key_the_tensordict_gets_outputs_only() -> None:
    with ActivationCaching("linear").prepare(Two()) as hooked:
        assert set(hooked(TensorDict({"input": X})).keys()) == {"input", "output"} and hooked.out_keys == ["output"]


@pytest.mark.parametrize("key", ["output", ("output", "below")])
def test_a_cache_key_in_the_way_of_an_output_is_refused_on_enter(key: Any, hooks_of: Any) -> None:
    model = Two()
    context = ActivationCaching("", cache_key=key).prepare(model)
    with pytest.raises(ValueError, match="cache_key=.*output 'output'"), context:
        pass
    assert hooks_of(model) == 0
    with pytest.raises(TypeError, match="cache_key is a string"):
        ActivationCaching("", cache_key=3)  # ty: ignore[invalid-argument-type]


def test_a_callback_is_told_the_key_of_the_cache() -> None:
    keys = []

    def callback(output: Tensor, key: Any, **_: Any) -> Tensor:
        keys.append(key)
        return output

    run(ActivationCaching("linear", callback=callback), Two())
    run(ActivationCaching("linear1", callback=callback, use_nested_keys=True), Two())
    assert keys == ["linear1", "linear2", ("fwd", "linear1")]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("linear", {"linear1", "linear2"}),
        ("", {"linear1", "linear2"}),
        ("linear2$", {"linear2"}),
        ("linear[13]", {"linear1"}),
        (".*2", {"linear2"}),
    ],
)
def test_a_pattern_matches_names_from_their_start(pattern: str, names: set[str]) -> None:
    assert set(run(ActivationCaching(pattern), Two()).keys()) == names


def test_names_may_start_at_the_wrapper() -> None:
    cache = run(ActivationCaching(r"td_module\.module\.linear1", relative=False), Two())
    assert torch.equal(cache["td_module.module.linear1"], HIDDEN)


@pytest.mark.parametrize("options", [{}, {"occurrences": "all"}, {"tokens": "all"}, {"early_stop": True}])
def test_the_model_itself_has_a_name_from_the_wrapper_only(options: Any) -> None:
    cache = run(ActivationCaching(r"td_module\.module$", relative=False, **options), Two(), X[None])
    assert torch.equal(cache["td_module.module"].reshape(OUT.shape), OUT)
    with pytest.raises(ValueError, match="matches no module"):
        run(ActivationCaching("$"), Two())


def test_names_of_a_tensordict_module_start_with_module() -> None:
    wrapped = TensorDictModule(Two(), ["x"], ["y"])
    with ActivationCaching("module.linear1").prepare(wrapped) as hooked:
        hooked(TensorDict({"x": X}))
    assert torch.equal(hooked.hooking_context.cache["module.linear1"], HIDDEN)
    with ActivationCaching(r"td_module\.module\.linear1", relative=False).prepare(wrapped) as hooked:
        hooked(TensorDict({"x": X}))
    assert set(hooked.hooking_context.cache.keys()) == {"td_module.module.linear1"}


def test_a_tensordict_module_inside_a_sequence_can_be_cached() -> None:
    chain = TensorDictSequential(TensorDictModule(nn.Identity(), ["x"], ["h"]), TensorDictModule(Two(), ["h"], ["y"]))
    with ActivationCaching(r"module\.\d$").prepare(chain) as hooked:
        hooked(TensorDict({"x": X}))
    cache = hooked.hooking_context.cache
    assert torch.equal(cache["module.1"]["y"], OUT)
    assert "y" not in cache["module.0"].keys()


@pytest.mark.parametrize("pattern", ["(", "[a", "*"])
def test_a_bad_regex_is_refused_at_construction_and_by_the_property(pattern: str) -> None:
    with pytest.raises(re.error):
        ActivationCaching(pattern)
    factory = ActivationCaching("linear1")
    with pytest.raises(re.error):
        factory.key_pattern = pattern
    assert factory.key_pattern == "linear1"


def test_key_pattern_can_be_set() -> None:
    factory = ActivationCaching("linear1")
    factory.key_pattern = "linear2"
    assert torch.equal(run(factory, Two())["linear2"], OUT)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"directions": ["forward"]}, "unknown hook direction 'forward'"),
        ({"occurrences": "first"}, "'last' or 'all', got 'first'"),
        ({"early_stop": True, "occurrences": "all"}, "early_stop"),
        ({"early_stop": True, "directions": ["bwd"]}, "early_stop"),
        ({"tokens": "lst"}, "did you mean 'last'"),
        ({"tokens": "last", "directions": ["bwd"]}, "tokens"),
        ({"skip_first": -1}, "skip_first"),
    ],
)
def test_a_bad_argument_is_refused_at_construction(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ActivationCaching("linear1", **options)


def test_a_pattern_that_matches_nothing_names_close_modules(hooks_of: Any) -> None:
    model = Two()
    with pytest.raises(ValueError, match=r"'lineer1\\.x' matches no module of Two.*'linear1'"):
        run(ActivationCaching(r"lineer1\.x"), model)
    assert hooks_of(model) == 0
    assert run(ActivationCaching("lineer1", required=False), model).is_empty()


def test_a_factory_serves_many_models_and_survives_pickle_and_deepcopy() -> None:
    factory = ActivationCaching("linear1", directions=["fwd_pre"], use_nested_keys=True)
    for twin in (factory, copy.deepcopy(factory), pickle.loads(pickle.dumps(factory))):  # noqa: S301
        assert torch.equal(run(twin, Two())["fwd_pre", "linear1"], X)


def test_the_model_can_be_copied_and_saved_in_and_after_the_block(hooks_of: Any) -> None:
    model, factory = Two(), ActivationCaching("linear", occurrences="all", directions=["fwd"])
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    with factory.prepare(model) as hooked:
        twin, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(twin(X), OUT) and torch.equal(loaded(X), OUT)
        assert hooked.hooking_context.n_fired == {"linear1": 0, "linear2": 0}
        hooked(X)
    assert hooks_of(model) == 0
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before
    torch.save(model, io.BytesIO())
