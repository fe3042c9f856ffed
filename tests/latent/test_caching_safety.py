"""What is cached stays what it was, gradients reach it, and the model computes what it computes without hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from caching_tools import Net, linear
from tdprobe.latent import ActivationCaching

X = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])


class Keyword(nn.Module):
    """Calls its child by keyword only, as attention of Hugging Face models is called."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child(input=x)


class Stash(nn.Module):
    """Holds on to what it returned, as stateful cells do."""

    state: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.state = x * 3
        return self.state


def write_output(y: Any, x: Tensor) -> Tensor:
    y += 100
    return y + x


def write_input(y: Any, x: Tensor) -> Tensor:
    x += 100
    return y + x


def write_relu(y: Any, x: Tensor) -> Tensor:
    return nn.functional.relu(y, inplace=True) + x


def write_through_view(y: Any, x: Tensor) -> Tensor:
    y.view(-1)[0] = 100
    x.t().mul_(7)
    return y.sum() + x


def write_nothing(y: Any, x: Tensor) -> Tensor:
    return y * y + x


WRITES = [write_output, write_input, write_relu, write_through_view, write_nothing]
# module, its output for the input z
FIRST: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "linear": (linear, lambda z: z * torch.tensor([2.0, 3.0])),
    "identity": (nn.Identity, lambda z: z),
    "dropout in eval": (lambda: nn.Dropout(0.5).eval(), lambda z: z),
    "view of the input": (lambda: nn.Flatten(0, 0), lambda z: z),
    "in place": (lambda: nn.ReLU(inplace=True), lambda z: z.clamp(min=0)),
    "by keyword": (lambda: Keyword(nn.Identity()), lambda z: z),
    "stash": (Stash, lambda z: z * 3),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("direction", ["fwd", "fwd_kwargs", "fwd_pre", "fwd_pre_kwargs"])
def test_writes_never_change_the_cache_and_hooks_never_change_the_model(
    write: Any, kind: str, mode: str, direction: Any
) -> None:
    make, expected = FIRST[kind]
    model = Net(make(), write)
    guard = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    needs_grad = mode == "grad"

    def call(run: Any) -> tuple[Tensor, Any]:
        x = X.clone().requires_grad_(needs_grad)
        with guard():
            out = run(x)
        try:
            return out, torch.autograd.grad(out.sum(), x)[0] if needs_grad else None
        except RuntimeError as error:
            # Some of these writes destroy what autograd needs: then they must do so under hooks, too.
            assert "modified by an inplace operation" in str(error)
            return out, None

    bare = call(model)
    with ActivationCaching("first", directions=[direction]).prepare(model) as hooked:
        inside = call(hooked)
    values = hooked.hooking_context.cache
    torch.testing.assert_close(inside, bare, rtol=0, atol=0)
    wanted = expected(X * 2) if "pre" not in direction else X * 2
    assert values.keys() and all(torch.equal(values[name], wanted) for name in values.keys())


@pytest.mark.parametrize("grad", [False, True])
def test_a_module_that_later_overwrites_what_it_returned(grad: bool) -> None:
    model = nn.Sequential(Stash(), nn.Identity())
    with torch.set_grad_enabled(grad), ActivationCaching("0").prepare(model) as hooked:
        hooked(X.clone().requires_grad_(grad))
        with torch.no_grad():
            model[0].state.zero_()
    assert torch.equal(hooked.hooking_context.cache["0"], X * 3)


@pytest.mark.parametrize("occurrences", ["last", "all"])
def test_a_recurrent_state_updated_in_place(occurrences: Any) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = torch.zeros(2)

        def forward(self, x: Tensor) -> Tensor:
            self.state += x
            return self.state

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                out = self.cell(x)
            return out

    model = Loop()
    with ActivationCaching("cell", occurrences=occurrences).prepare(model) as hooked:
        assert hooked(torch.ones(2)).tolist() == [3, 3]
    assert model.cell.state.tolist() == [3, 3]
    assert hooked.hooking_context.cache["cell"].tolist() == [3, 3]
    if occurrences == "all":
        assert hooked.hooking_context.stacked("cell").tolist() == [[1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_copied_where_nothing_writes(grad: bool) -> None:
    model = nn.Sequential(linear(), nn.Sigmoid(), linear())
    held: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda module, args: held.append(args[0]))
    with torch.set_grad_enabled(grad), ActivationCaching("0").prepare(model) as hooked:
        hooked(X)
    value = hooked.hooking_context.cache["0"]
    # const_data_ptr does not break the sharing, data_ptr would.
    assert torch._C._is_cow_tensor(value) and torch._C._is_cow_tensor(held[0])
    held[0].detach().zero_()
    assert torch.equal(value, X * torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_cached_slice_does_not_pin_the_whole(mode: Any) -> None:
    factory = ActivationCaching("0", callback=lambda output, **_: output[:, -1])
    with mode(), factory.prepare(nn.Sequential(nn.Tanh())) as hooked:
        hooked(torch.arange(2000.0).view(2, 500, 2))
    value = hooked.hooking_context.cache["0"]
    assert value.untyped_storage().nbytes() == 2 * 2 * 4 and not value.is_inference()
    assert torch.equal(value, torch.tensor([[998.0, 999.0], [1998.0, 1999.0]]).tanh())


def test_a_cached_tensordict_is_a_copy() -> None:
    holder = TensorDict({"a": torch.zeros(2)}, [2])
    with ActivationCaching("0", callback=lambda **_: holder).prepare(nn.Sequential(linear())) as hooked:
        hooked(X)
    holder["a"] += 1
    assert hooked.hooking_context.cache["0", "a"].tolist() == [0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_modes_parameters_and_random_state_are_left_alone(training: bool) -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5), linear()).train(training)
    model[0].weight.requires_grad_(False)
    torch.manual_seed(3)
    bare, state = model(X), torch.get_rng_state()
    torch.manual_seed(3)
    with ActivationCaching("").prepare(model) as hooked:
        inside = hooked(X)
    assert torch.equal(inside, bare) and torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == [training] * 4
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_values_have_the_dtype_of_autocast() -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        ActivationCaching("0").prepare(nn.Sequential(linear())) as hooked,
    ):
        hooked(X)
    value = hooked.hooking_context.cache["0"]
    assert value.dtype == torch.bfloat16 and torch.equal(value.float(), X * torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_callers_cache_moves_or_binds_shapes(device: str | None) -> None:
    cache = TensorDict(batch_size=[2], device=device)
    with ActivationCaching("0", cache=cache).prepare(nn.Sequential(linear())) as hooked:
        hooked(X)
        with pytest.raises(RuntimeError, match="batch"):
            hooked(torch.ones(3, 2))
    assert hooked.hooking_context.cache is cache
    assert torch.equal(cache["0"], X * torch.tensor([2.0, 3.0]))


def test_a_cache_on_another_device_gets_values_there() -> None:
    cache = TensorDict(device="meta")
    with ActivationCaching("0", cache=cache).prepare(nn.Sequential(linear())) as hooked:
        hooked(X)
    assert cache["0"].device.type == "meta" and cache["0"].shape == (2, 2)


@pytest.mark.parametrize("clear", [True, False])
def test_entering_clears_the_callers_cache_unless_told_not_to(clear: bool) -> None:
    cache = TensorDict({"kept": torch.ones(1)})
    context = ActivationCaching("0", cache=cache, clear_cache=clear).prepare(nn.Sequential(linear()))
    with context as hooked:
        hooked(X)
    assert set(cache.keys()) == ({"0"} if clear else {"0", "kept"})
    context.clear()
    assert cache.is_empty() and context.cache is cache


@pytest.mark.parametrize("grad", [True, False])
def test_sparse_and_complex_values_are_cached_as_they_are(grad: bool) -> None:
    for change in (torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, lambda x: torch.complex(x, x)):
        model = Net(linear(), lambda y, x: y)
        model.first = Net(nn.Identity(), lambda y, x, change=change: change(y))
        with torch.set_grad_enabled(grad), ActivationCaching("first$").prepare(model) as hooked:
            out = hooked.td_module.module(X.clone().requires_grad_(grad))
        value = hooked.hooking_context.cache["first"]
        assert value.layout == out.layout and value.dtype == out.dtype
        assert torch.equal(value.to_dense(), change(X * 4).to_dense())
