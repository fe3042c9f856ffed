"""Reading, writing and stopping at single modules of a hooked module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.contexts import HookingContextFactory
from tdprobe.latent import ActivationCaching, SteeringVectors

X = torch.tensor([[1.0, 2.0]])


def chain() -> nn.Sequential:
    """Three layers that double, add one and negate."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for layer, scale, shift in zip(model, (2, 1, -1), (0, 1, 0), strict=True):
        layer.weight.data, layer.bias.data = scale * torch.eye(2), torch.full((2,), float(shift))
    return model


class Pair(nn.Module):
    def forward(self, x: Tensor, *, y: Tensor | None = None) -> tuple[None, Tensor, Tensor]:
        return None, (x if y is None else y) * 2, x + 100


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        _, first, second = self.pair(y=x, x=x)
        return first + second


def test_get_stores_the_output_and_its_proxy_gives_it() -> None:
    cache = TensorDict()
    with HookingContextFactory().prepare(chain()) as hooked:
        handle, proxy = hooked.get(cache, "[0]")
        with pytest.raises(RuntimeError, match="nothing has been stored under '\\[0\\]_output'"):
            proxy.resolve()
        hooked(X)
        assert proxy.resolve() is cache["[0]_output"] and torch.equal(cache["[0]_output"], 2 * X)
        handle.remove()
        hooked(X * 5)
        assert torch.equal(proxy.resolve(), 2 * X)


def test_set_replaces_the_output_also_by_what_get_stored() -> None:
    cache = TensorDict()
    with HookingContextFactory().prepare(chain()) as hooked:
        _, proxy = hooked.get(cache, "[0]", "kept")
        handle = hooked.set("[1]", proxy)
        assert torch.equal(hooked(X), -2 * X)
        handle.remove()
        assert torch.equal(hooked(X), -(2 * X + 1))


@pytest.mark.parametrize(
    ("direction", "named"),
    [
        ("fwd", {"module", "args", "output"}),
        ("fwd_kwargs", {"module", "args", "kwargs", "output"}),
        ("fwd_pre", {"module", "args"}),
        ("fwd_pre_kwargs", {"module", "args", "kwargs"}),
        ("bwd", {"module", "grad_input", "grad_output"}),
        ("bwd_pre", {"module", "grad_output"}),
    ],
)
def test_callbacks_get_the_documented_keywords(direction: str, named: set[str]) -> None:
    seen: dict[str, set[str]] = {}

    def read(**given: Any) -> Tensor:
        seen["get"] = set(given)
        return X

    def write(**given: Any) -> None:
        seen["set"] = set(given)

    with HookingContextFactory().prepare(chain()) as hooked:
        hooked.get(TensorDict(), "1", callback=read, direction=direction)
        hooked.set("1", 7, callback=write, direction=direction)
        hooked(X.clone().requires_grad_()).sum().backward()
    assert seen == {"get": named | {"key", "direction"}, "set": named | {"value", "direction"}}


@pytest.mark.parametrize("method", ["get", "set"])
def test_a_callback_that_lacks_an_argument_is_refused_before_anything_is_set(method: str, hooks_of: Any) -> None:
    model = chain()
    with HookingContextFactory().prepare(model) as hooked:
        with pytest.raises(ValueError, match="lacks the argument"):
            if method == "get":
                hooked.get(TensorDict(), "1", callback=lambda key: X)
            else:
                hooked.set("1", X, callback=lambda value: X)
        assert hooks_of(model) == 0


def test_inputs_are_read_and_written_by_position_and_by_name() -> None:
    cache = TensorDict()
    with HookingContextFactory().prepare(chain()) as hooked:
        hooked.get_input(cache, "[1]")
        hooked.set_input("[2]", X * 50)
        assert torch.equal(hooked(X), -50 * X)
    assert torch.equal(cache["[1]_input"], 2 * X)
    with HookingContextFactory().prepare(Tail()) as hooked:
        hooked.set_input("pair", X * 3)
        assert torch.equal(hooked(X), X * 6 + X + 100)


def test_of_a_tuple_the_first_tensor_is_read_and_written_and_the_rest_stays() -> None:
    cache = TensorDict()
    with HookingContextFactory().prepare(Tail()) as hooked:
        hooked.get(cache, "pair")
        hooked.set("pair", X * 7)
        assert torch.equal(hooked(X), X * 7 + X + 100)
    assert torch.equal(cache["pair_output"], X * 7)


def test_gradients_are_read_and_written() -> None:
    cache, x = TensorDict(), X.clone().requires_grad_()
    with HookingContextFactory().prepare(chain()) as hooked:
        hooked.get_grad(cache, "[2]")
        hooked.get_grad_output(cache, "[0]")
        hooked(x).sum().backward()
        assert cache["[2]_grad_input"].tolist() == [[-1, -1]] and cache["[0]_grad_output"].tolist() == [[-1, -1]]
        assert x.grad.tolist() == [[-2, -2]]
        for method, place, expected in (
            ("set_grad", "[2]", 10),
            ("set_grad_output", "[0]", 10),
            ("set_grad", "[0]", 5),
        ):
            x.grad = None
            handle = getattr(hooked, method)(place, torch.full((1, 2), 5.0))
            hooked(x).sum().backward()
            handle.remove()
            assert x.grad.tolist() == [[expected] * 2]


def test_what_get_stores_receives_gradients() -> None:
    cache = TensorDict()
    with HookingContextFactory().prepare(chain()) as hooked:
        _, proxy = hooked.get(cache, "[1]")
        out = hooked(X)
    (gradient,) = torch.autograd.grad((out**2).sum(), proxy.resolve())
    assert torch.equal(gradient, 2 * (2 * X + 1))


def test_writing_comes_before_reading_unless_reading_is_put_first() -> None:
    cache = TensorDict()
    with HookingContextFactory().prepare(chain()) as hooked:
        hooked.get(cache, "[0]", "after")
        hooked.set("[0]", X * 9)
        hooked.get(cache, "[0]", "before", prepend=True)
        hooked(X)
    assert torch.equal(cache["after"], X * 9) and torch.equal(cache["before"], X * 2)


def test_set_put_first_is_overwritten_by_the_others() -> None:
    with HookingContextFactory().prepare(chain()) as hooked:
        hooked.set("[2]", X * 3)
        hooked.set("[2]", X * 4, prepend=True)
        assert torch.equal(hooked(X), X * 3)


@pytest.mark.parametrize(
    ("value", "problem"), [((X,), "is a tuple, the 'fwd' value a Tensor"), (3, "is a int, the 'fwd' value a Tensor")]
)
def test_a_value_of_another_type_is_refused(value: Any, problem: str) -> None:
    with HookingContextFactory().prepare(chain()) as hooked:
        hooked.set("[0]", value)
        with pytest.raises(RuntimeError, match=problem):
            hooked(X)


def test_a_value_of_another_shape_is_refused_and_one_of_another_dtype_fitted() -> None:
    with HookingContextFactory().prepare(chain()) as hooked:
        handle = hooked.set("[2]", torch.ones(3, 2))
        with pytest.raises(ValueError, match=r"\(3, 2\), the module gave \(1, 2\)"):
            hooked(X)
        handle.remove()
        hooked.set("[2]", X.double())
        assert hooked(X).dtype == torch.float32


def test_stop_ends_calls_of_the_hooked_module_only() -> None:
    model, ran = chain(), []
    model[2].register_forward_hook(lambda *_: ran.append(1))
    cache = TensorDict()
    with HookingContextFactory().prepare(model) as hooked:
        hooked.get(cache, "[1]")
        handle = hooked.stop("[1]")
        td = TensorDict({"input": X})
        assert hooked(X) is None and hooked(td) is td and "output" not in td.keys() and not ran
        assert torch.equal(cache["[1]_output"], 2 * X + 1)
        assert torch.equal(model(X), -(2 * X + 1)) and ran
        handle.remove()
        assert torch.equal(hooked(X), -(2 * X + 1))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_what_was_set_goes_with_the_block(error: Any, hooks_of: Any) -> None:
    model = chain()
    bare = model(X)
    try:
        with ActivationCaching("0").prepare(model) as hooked:
            hooked.set("[1]", X)
            hooked.get(TensorDict(), "[2]")
            hooked.stop("[2]")
            hooked(X)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert hooks_of(model) == 0 and torch.equal(model(X), bare)
    with pytest.raises(RuntimeError, match="outside"):
        hooked.set("[1]", X)


def test_what_was_set_is_lifted_and_set_again_with_the_contexts_own_hooks(hooks_of: Any) -> None:
    model = chain()
    with ActivationCaching("0").prepare(model) as hooked:
        removed = hooked.set("[1]", X * 8)
        removed.remove()
        hooked.set("[2]", X * 4)
        with hooked.disable_context_hooks():
            assert hooks_of(model) == 0
            assert torch.equal(model(X), -(2 * X + 1))
        assert hooks_of(model) == 2 and torch.equal(hooked(X), X * 4)


def test_relative_false_starts_at_the_hooked_module() -> None:
    with HookingContextFactory().prepare(chain()) as hooked:
        hooked.set("td_module.module[2]", X, relative=False)
        assert torch.equal(hooked(X), X)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("[7]", "has 3 modules"),
        ("[0:2]", r"2 modules; name one, such as '\[0\]'"),
        ("[0].reset_parameters()", "cannot read"),
    ],
)
def test_a_path_must_lead_to_one_module(path: str, problem: str, hooks_of: Any) -> None:
    model = chain()
    with HookingContextFactory().prepare(model) as hooked:
        for call in (lambda: hooked.get(TensorDict(), path), lambda: hooked.set(path, X), lambda: hooked.stop(path)):
            with pytest.raises(ValueError, match=problem):
                call()
        assert hooks_of(model) == 0


def test_a_value_set_in_one_block_comes_before_the_interventions_of_later_ones() -> None:
    model = chain()
    with HookingContextFactory().prepare(model) as hooked:
        with SteeringVectors(["[0]"], lambda module_key, output: output + 1).prepare(model):
            hooked.set("[0]", X * 10)
            assert torch.equal(hooked(X), -(X * 10 + 1 + 1))
