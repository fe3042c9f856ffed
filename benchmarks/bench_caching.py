"""What caching costs beside the forward pass, and per hook."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.models import language_model, random_batches
from tdprobe import ActivationCaching

LAYERS = r"model\.layers\.\d+$"
HOOKS = 100


class AddOne(nn.Module):
    """The least that a module can do and still return a new tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def cache_layers(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with ActivationCaching(LAYERS).prepare(model) as hooked:
        hooked(**inputs)


def hook_plainly(model: nn.Module, kept: dict[str, Any]) -> None:
    """Put the hook that one writes by hand on every child."""

    def keeping(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = output

        return hook

    for name, child in model.named_children():
        child.register_forward_hook(keeping(name))


def per_hook(setup: Setup, *, grad: bool) -> Measured:
    """Compare hooks on a chain of modules that do next to nothing, in microseconds per hook."""
    ours = nn.Sequential(*(AddOne() for _ in range(HOOKS)))
    plain = copy.deepcopy(ours)
    hook_plainly(plain, {})
    x = torch.zeros(8, requires_grad=grad)
    loops = 1 if setup.tiny else 30
    # The model itself is called: what the hooked module's own call costs is another bench's.
    with ActivationCaching("").prepare(ours), torch.set_grad_enabled(grad):
        contenders = {"plain": lambda: plain(x), "ours": lambda: ours(x)}
        times = interleave(contenders, 4 * setup.rounds, loops=loops, unit="us")
    return Measured(*([value / HOOKS for value in times[name]] for name in ("ours", "plain")), "us")


@bench(
    "caching",
    "ActivationCaching: 30 layers of SmolLM2 over the bare forward; one hook over register_forward_hook",
    {
        "whole block, 16 x 32 tokens": Bar("ratio", 1.03),
        "one hook": Bar("excess", 4.0),
        "one hook, values with gradient": Bar("excess"),
    },
)
def caching(setup: Setup) -> dict[str, Measured]:
    model = language_model(setup)
    (inputs,) = random_batches(model, 1)
    with torch.no_grad():
        contenders = {"bare": lambda: model(**inputs), "ours": lambda: cache_layers(model, inputs)}
        times = interleave(contenders, setup.rounds)
    return {
        "whole block, 16 x 32 tokens": Measured(times["ours"], times["bare"]),
        "one hook": per_hook(setup, grad=False),
        "one hook, values with gradient": per_hook(setup, grad=True),
    }
