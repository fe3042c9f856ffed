"""Forward passes that end when everything asked for has been seen."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.latent import ActivationCaching

X = torch.tensor([[1.0, 2.0]])


class Counting(nn.Module):
    """Five steps in an order that is not that of their names; counts how many ran."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
        self.order = (3, 0, 4, 1, 2)
        self.ran: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            self.ran.append(i)
            x = self.steps[i](x)
        return x

    def generate(self, x: Tensor) -> Tensor:
        return self(self(x))


@pytest.mark.parametrize(
    ("pattern", "ran"),
    [(r"steps\.3", [3]), (r"steps\.[04]", [3, 0, 4]), (r"steps\.[13]", [3, 0, 4, 1]), ("", [3, 0, 4, 1, 2])],
)
@pytest.mark.parametrize("direction", ["fwd", "fwd_pre"])
def test_a_pass_ends_after_the_last_matched_module_in_the_order_of_execution(
    pattern: str, ran: list[int], direction: Any, hooks_of: Any
) -> None:
    model = Counting()
    full = ActivationCaching(pattern, directions=[direction]).prepare(model)
    with full as hooked:
        out = hooked(X)
    model.ran.clear()
    early = ActivationCaching(pattern, directions=[direction], early_stop=True).prepare(model)
    with early as hooked:
        assert hooked(X) is None
        assert model.ran == ran
        td = TensorDict({"input": X})
        assert hooked(td) is td and set(td.keys()) == {"input"}
        assert model.ran == ran * 2
        # Who calls the model itself, or lets it generate, wants the output.
        assert torch.equal(model(X), out)
        assert torch.equal(hooked.generate(X), model(out))
    with early as hooked:
        hooked(X)
    assert set(early.cache.keys()) == set(full.cache.keys())
    assert all(torch.equal(early.cache[name], full.cache[name]) for name in full.cache.keys())
    assert torch.equal(model(X), out) and hooks_of(model) == 0


def test_a_module_that_may_not_run_does_not_stop_the_pass_short() -> None:
    model = Counting()
    model.order = (3, 0)
    with (
        warnings.catch_warnings(record=True) as caught,
        ActivationCaching("", early_stop=True).prepare(model) as hooked,
    ):
        assert hooked(X).shape == (1, 2)
    assert model.ran == [3, 0]
    (warning,) = caught
    assert "steps.1, steps.2, steps.4" in str(warning.message)


def test_model_code_that_catches_exceptions_cannot_swallow_the_stop() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except Exception:
                return x * 0

    with ActivationCaching("inner", early_stop=True).prepare(Careful()) as hooked:
        assert hooked(X) is None
    assert torch.equal(hooked.hooking_context.cache["inner"], X)


def test_an_error_before_the_stop_comes_through() -> None:
    model = Counting()
    model.order = (3, 9)
    with pytest.raises(IndexError), ActivationCaching(r"steps\.4", early_stop=True).prepare(model) as hooked:
        hooked(X)


def test_lifted_hooks_do_not_stop_anything() -> None:
    model = Counting()
    with ActivationCaching(r"steps\.3", early_stop=True).prepare(model) as hooked:
        hooked(X)
        with hooked.disable_context_hooks():
            assert torch.equal(hooked(X), model(X))
