"""What ActivationCaching stores: directions, callbacks, names, keys, the caller's cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from caching_tools import HIDDEN, OUT, Two, X, run
from tdprobe.errors import TdprobeError
from tdprobe.latent import ActivationCaching


def last_of(name: str) -> Any:
    def callback(**given: Any) -> Tensor:
        return given[name][0] if isinstance(given[name], tuple) else given[name]

    return callback


def test_the_output_of_a_matched_module_is_cached() -> None:
    cache = run(ActivationCaching("linear1"), Two())
    assert set(cache.keys()) == {"linear1"}
    assert torch.equal(cache["linear1"], HIDDEN)
    assert cache.batch_size == torch.Size([])


@pytest.mark.parametrize(
    ("direction", "value"),
    [
        ("fwd", OUT),
        ("fwd_kwargs", OUT),
        ("fwd_pre", HIDDEN),
        ("fwd_pre_kwargs", HIDDEN),
        # y = sum(out): the gradient at the output is 1, and the documented value of "bwd" is grad_output.
        ("bwd", torch.ones(2, 1)),
        ("bwd_pre", torch.ones(2, 1)),
    ],
)
def test_each_direction_caches_its_documented_value(direction: Any, value: Tensor) -> None:
    model, factory = Two(), ActivationCaching("linear2", directions=[direction])
    with factory.prepare(model) as hooked:
        hooked(X).sum().backward()
    assert torch.equal(hooked.hooking_context.cache["linear2"], value)


NAMED = {
    "fwd": {"module", "args", "output"},
    "fwd_kwargs": {"module", "args", "kwargs", "output"},
    "fwd_pre": {"module", "args"},
    "fwd_pre_kwargs": {"module", "args", "kwargs"},
    "bwd": {"module", "grad_input", "grad_output"},
    "bwd_pre": {"module", "grad_output"},
}


@pytest.mark.parametrize("direction", NAMED)
def test_a_callback_gets_the_documented_keywords(direction: Any) -> None:
    model, seen = Two(), {}

    def callback(**given: Any) -> Tensor:
        seen.update(given)
        return torch.tensor([7.0])

    with ActivationCaching("linear1", callback=callback, directions=[direction]).prepare(model) as hooked:
        hooked(X).sum().backward()
    assert set(seen) == NAMED[direction] | {"key", "direction"}
    assert (seen["module"], seen["key"], seen["direction"]) == (model.linear1, "linear1", direction)
    if "args" in seen:
        assert len(seen["args"]) == 1 and seen["args"][0] is X
    if "kwargs" in seen:
        assert seen["kwargs"] == {}
    if "output" in seen:
        assert torch.equal(seen["output"], HIDDEN)
    if "grad_output" in seen:
        assert torch.equal(seen["grad_output"][0], torch.tensor([[1.0, -1.0, 3.0]]).expand(2, 3))
    assert hooked.hooking_context.cache["linear1"].tolist() == [7.0]


def test_grad_input_reaches_a_callback_of_bwd() -> None:
    x = X.clone().requires_grad_()
    factory = ActivationCaching("linear1", callback=last_of("grad_input"), directions=["bwd"])
    with factory.prepare(Two()) as hooked:
        hooked(x).sum().backward()
    # d out / dx = linear2.weight @ linear1.weight = [1 + 3, -2 + 3]
    assert torch.equal(hooked.hooking_context.cache["linear1"], torch.tensor([[4.0, 1.0], [4.0, 1.0]]))


@pytest.mark.parametrize(
    ("callback", "problem"),
    [
        (lambda module, output, key, direction: output, "args"),
        (lambda key, direction: None, "module, args, output"),
        (lambda module, args, output, key, direction, /: output, "by position only"),
        (lambda *args: args[-1], "module, args, output"),
        (3, "callback"),
    ],
)
def test_a_callback_that_cannot_take_the_keywords_is_refused_on_enter(
    callback: Any, problem: str, hooks_of: Any
) -> None:
    model = Two()
    context = ActivationCaching("linear1", callback=callback).prepare(model)
    with pytest.raises(ValueError, match=problem) as caught, context:
        pass
    assert isinstance(caught.value, TdprobeError)
    assert hooks_of(model) == 0


def test_a_callback_that_lacks_key_fails_when_it_is_called() -> None:
    factory = ActivationCaching("linear1", callback=lambda module, args, output: output)
    with pytest.raises(TypeError, match="key"):
        run(factory, Two())


@pytest.mark.parametrize("result", [None, 3, "text", [], {"a": None}, (None, None)])
def test_a_value_without_a_tensor_is_refused(result: Any) -> None:
    factory = ActivationCaching("linear1", callback=lambda **_: result)
    with pytest.raises(RuntimeError, match=rf"'linear1' is a {type(result).__name__} without.*callback"):
        run(factory, Two())


def test_a_callback_may_return_a_tensordict() -> None:
    factory = ActivationCaching(
        "linear1", callback=lambda output, **_: TensorDict({"twice": output * 2}, batch_size=[2])
    )
    assert torch.equal(run(factory, Two())["linear1", "twice"], HIDDEN * 2)
