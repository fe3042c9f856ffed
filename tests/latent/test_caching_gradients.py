"""Gradients reach what is cached, and are those that they would be without hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from caching_tools import Net, linear
from tdprobe.latent import ActivationCaching

X = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])


class Stash(nn.Module):
    """Holds on to what it returned, as stateful cells do."""

    state: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.state = x * 3
        return self.state


class Part(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 3)[:, 1:]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, x * 3, x * 5


@pytest.mark.parametrize(
    ("make", "direction"),
    [
        (linear, "fwd"),
        (linear, "fwd_kwargs"),
        (linear, "fwd_pre"),
        (nn.Identity, "fwd"),
        (lambda: nn.Flatten(0, 0), "fwd"),
        (lambda: nn.Unflatten(1, (2, 1)), "fwd"),
        (lambda: nn.ReLU(inplace=True), "fwd"),
        (Stash, "fwd"),
        (Part, "fwd"),
    ],
)
def test_a_cached_value_receives_the_whole_gradient(make: Any, direction: Any) -> None:
    model = Net(make(), lambda y, x: y.flatten() ** 2)
    with ActivationCaching("first", directions=[direction]).prepare(model) as hooked:
        out = hooked(X.clone().requires_grad_())
        value = hooked.hooking_context.cache["first"]
        value.retain_grad()
        out.sum().backward()
        first = value.grad.clone()
        assert value.requires_grad
    # y = x' A', so d sum(y^2) / dy = 2 y, and with respect to the input of the linear layer 2 y A.
    scale = torch.tensor([4.0, 9.0]) if direction == "fwd_pre" else 1
    torch.testing.assert_close(first, 2 * value.detach() * scale)


@pytest.mark.parametrize("make", [linear, nn.Identity])
def test_gradients_of_a_loss_on_the_cached_value_are_counted_once(make: Any) -> None:
    model = Net(make(), lambda y, x: y * 5)
    with ActivationCaching("first").prepare(model) as hooked:
        for passes in (1, 2):
            out = hooked(X.clone().requires_grad_())
            value = hooked.hooking_context.cache["first"]
            value.retain_grad()
            for _ in range(passes):
                (out.sum() + 7 * value.sum()).backward(retain_graph=True)
            assert torch.equal(value.grad, torch.full_like(X, 12.0 * passes))


def test_a_linear_layer_with_bias_on_three_axes_is_differentiable_by_name() -> None:
    model = nn.Sequential(linear(), nn.Tanh())
    with ActivationCaching("0").prepare(model) as hooked:
        out = hooked(torch.ones(1, 2, 2) / 10)
    (gradient,) = torch.autograd.grad(out.sum(), hooked.hooking_context.cache["0"])
    torch.testing.assert_close(gradient, (1 - out**2).detach())


def test_nothing_stays_on_the_callers_tensor_when_the_cache_is_dropped() -> None:
    x = X.clone().requires_grad_()
    context = ActivationCaching("0", directions=["fwd_pre"]).prepare(nn.Sequential(nn.Linear(2, 2)))
    for _ in range(3):
        with context as hooked:
            hooked(x)
    assert len(x._backward_hooks) == 1
    context.clear()
    assert not x._backward_hooks


def test_a_callback_may_hand_out_a_differentiable_part() -> None:
    model = Net(Pair(), lambda y, x: y[2] ** 2)
    with ActivationCaching("first", callback=lambda output, **_: output[2]).prepare(model) as hooked:
        out = hooked(X.clone().requires_grad_())
        value = hooked.hooking_context.cache["first"]
        value.retain_grad()
        out.sum().backward()
    assert torch.equal(value, X * 10)
    assert torch.equal(value.grad, X * 20)


def test_of_a_tuple_the_first_tensor_is_cached_and_differentiable() -> None:
    seen = []
    model = Net(Pair(), lambda y, x: (seen.append((type(y), y[0], len(y))), y[1] ** 2 + y[2])[1])
    with ActivationCaching("first").prepare(model) as hooked:
        out = hooked(X.clone().requires_grad_())
    assert seen == [(tuple, None, 3)]
    value = hooked.hooking_context.cache["first"]
    (gradient,) = torch.autograd.grad(out.sum(), value)
    assert torch.equal(value, X * 6) and torch.equal(gradient, X * 12)


def test_values_from_inference_mode_can_train_a_probe() -> None:
    with torch.inference_mode(), ActivationCaching("0").prepare(nn.Sequential(linear())) as hooked:
        hooked(X)
    value = hooked.hooking_context.cache["0"]
    assert not value.is_inference()
    probe = nn.Linear(2, 1)
    probe(value).sum().backward()
    torch.testing.assert_close(probe.weight.grad, value.sum(0, keepdim=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_neither_adds_nor_overwrites(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(linear(), nn.Tanh())
            self.runs = 0
            self.inner[0].register_forward_hook(lambda *_: setattr(self, "runs", self.runs + 1))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, x = Checkpointed(), X.clone().requires_grad_()
    with ActivationCaching("inner", occurrences="all").prepare(model) as hooked:
        hooked(x).sum().backward()
    context = hooked.hooking_context
    assert model.runs == 2
    assert context.n_fired == {"inner": 1, "inner.0": 1, "inner.1": 1}
    assert len(context.occurrences["inner.0"]) == 1
    expected = (X * torch.tensor([2.0, 3.0])).tanh()
    torch.testing.assert_close(x.grad, (1 - expected**2) * torch.tensor([2.0, 3.0]))
