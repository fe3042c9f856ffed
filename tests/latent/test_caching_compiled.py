"""A compiled model works or raises: hooks added after torch.compile are never passed over in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdprobe.contexts import HookingContextFactory, Site
from tdprobe.hooks import Hook, MultiHookHandle
from tdprobe.latent import ActivationCaching
from tdprobe.modules import HookedModule

PATTERN = r"layers\.\d\.0$"
X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)) for _ in range(2))
        for layer in self.layers:
            layer[0].weight.data, layer[0].bias.data = torch.tensor([[1.0, 1.0], [0.0, -2.0]]), torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * 2


VALUES = {
    "layers.0.0": torch.tensor([[-1.0, 4.0], [7.0, -8.0]]),
    "layers.1.0": torch.tensor([[4.0, -8.0], [7.0, 0.0]]),
}
OUT = torch.tensor([[8.0, 0.0], [14.0, 0.0]])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., Any] | None]:
    return torch.compile(model, backend=backend), None


def by_method(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., Any] | None]:
    model.compile(backend=backend)
    return model, None


def per_layer(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., Any] | None]:
    for layer in model.layers:
        layer.compile(backend=backend)
    return model, None


def original_prepared(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., Any] | None]:
    return model, torch.compile(model, backend=backend)


def original_called(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., Any] | None]:
    return torch.compile(model, backend=backend), model


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", [whole, by_method, per_layer, original_prepared, original_called])
def test_a_model_compiled_before_the_block_gives_what_it_gives_uncompiled(way: Any, backend: str, grad: bool) -> None:
    prepared, call = way(Net(), backend)
    run = prepared if call is None else call
    with torch.set_grad_enabled(grad):
        assert torch.equal(run(X), OUT)
        with ActivationCaching(PATTERN).prepare(prepared) as hooked:
            inside = hooked if call is None else call
            inside(X * 3)
            out = inside(X)
        context = hooked.hooking_context
        assert torch.equal(out, OUT) and torch.equal(run(X * 5), OUT * 5)
    assert context.n_fired == dict.fromkeys(VALUES, 2)
    assert all(torch.equal(context.cache[name], value) for name, value in VALUES.items())
    if grad:
        (gradient,) = torch.autograd.grad(out.sum(), context.cache["layers.0.0"])
        # Through relu, the second layer and relu again: 2 where x0 > 0, and 2 where x1 > 0 (x1's own path is cut).
        assert gradient.tolist() == [[0, 2], [2, 0]]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_code_compiled_inside_the_block_does_not_write_to_the_cache_afterwards(backend: str) -> None:
    model = Net()
    with ActivationCaching(PATTERN).prepare(model) as hooked:
        compiled = torch.compile(model, backend=backend)
        assert torch.equal(compiled(X), OUT)
    assert torch.equal(compiled(X * 3), OUT * 3)
    context = hooked.hooking_context
    assert context.n_fired == dict.fromkeys(VALUES, 1)
    assert all(torch.equal(context.cache[name], value) for name, value in VALUES.items())


def test_hooks_lifted_and_contexts_stacked_on_a_compiled_model() -> None:
    compiled = torch.compile(Net(), backend="eager")
    compiled(X)
    outer, inner = (ActivationCaching(name).prepare(compiled) for name in (r"layers\.0\.0", r"layers\.1\.0"))
    with outer as hooked:
        hooked(X)
        with outer.disable_hooks():
            compiled(X)
        assert outer.n_fired == {"layers.0.0": 1}
        with inner:
            compiled(X)
        hooked(X)
        compiled(X)
    compiled(X)
    assert outer.n_fired == {"layers.0.0": 4} and inner.n_fired == {"layers.1.0": 1}


def test_a_compiled_function_around_the_model_raises() -> None:
    model = Net()
    step = torch.compile(lambda x: model(x) + 0, backend="eager")
    step(X)
    with pytest.raises(RuntimeError, match=r"none of the 2 hooked modules.*compiled"):
        with ActivationCaching(PATTERN).prepare(model):
            step(X)


def test_a_graph_that_may_not_break_raises_and_leaves_no_hook(hooks_of: Any) -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(X)
    with pytest.raises(torch._dynamo.exc.Unsupported), ActivationCaching(PATTERN).prepare(compiled) as hooked:
        hooked(X)
    assert hooks_of(model) == 0 and torch.equal(compiled(X), OUT)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_early_stop_of_a_compiled_model(backend: str) -> None:
    compiled = torch.compile(Net(), backend=backend)
    compiled(X)
    with ActivationCaching(r"layers\.0\.0", early_stop=True).prepare(compiled) as hooked:
        assert hooked(X) is None
    assert torch.equal(hooked.hooking_context.cache["layers.0.0"], VALUES["layers.0.0"])
    assert torch.equal(compiled(X), OUT)


class Zeroing(HookingContextFactory):
    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context, site = module.hooking_context, Site("layers.1")
        context.sites.append(site)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not context.gate.admits():
                return None
            context.fired(site)
            return output * 0

        return MultiHookHandle([Hook(context.model.layers[1], "fwd", hook, edits=True, order=context.gate.number)])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_edit_of_a_compiled_model_takes_effect_and_goes(backend: str) -> None:
    compiled = torch.compile(Net(), backend=backend)
    compiled(X)
    with Zeroing().prepare(compiled) as hooked:
        assert torch.equal(hooked(X), OUT * 0)
    assert torch.equal(compiled(X), OUT)
