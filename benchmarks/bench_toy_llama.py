"""Fixed costs: caching the layers of a model that is all Python overhead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.models import toy_llama
from tdprobe import ActivationCaching

LAYERS = 30
PATTERN = r"model\.layers\.\d+$"


def whole_block(model: nn.Module, ids: Tensor) -> None:
    with ActivationCaching(PATTERN).prepare(model) as hooked:
        hooked(input_ids=ids)


def raw_hooks(model: Any, ids: Tensor) -> None:
    """Do the same by hand: put hooks on, call, take them off."""
    kept: dict[int, Tensor] = {}

    def keeping(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[index] = output

        return hook

    handles = [layer.register_forward_hook(keeping(i)) for i, layer in enumerate(model.model.layers)]
    try:
        model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()


def compared(setup: Setup, *, grad: bool) -> dict[str, list[float]]:
    """Return CPU milliseconds of every way to run the model."""
    model = toy_llama(2 if setup.tiny else LAYERS)
    twin = copy.deepcopy(model)
    ids = torch.arange(8).unsqueeze(0)
    with ActivationCaching(PATTERN).prepare(twin) as hooked, torch.set_grad_enabled(grad):
        contenders = {
            "bare": lambda: model(input_ids=ids),
            "hooked call": lambda: hooked(input_ids=ids),
            "whole block": lambda: whole_block(model, ids),
            "raw hooks": lambda: raw_hooks(model, ids),
        }
        return interleave(contenders, 5 * setup.rounds, loops=1 if setup.tiny else 5, unit="ms")


@bench(
    "toy_llama",
    f"ActivationCaching of {LAYERS} layers of a toy Llama (width 64, B = 1, T = 8) over the bare forward",
    {
        "hooked call": Bar("excess", 2.0),
        "whole block": Bar("excess", 2.0),
        "raw hooks": Bar("excess"),
        "hooked call, recording gradients": Bar("excess", 2.0),
        "whole block, recording gradients": Bar("excess", 2.0),
        "raw hooks, recording gradients": Bar("excess"),
    },
)
def toy(setup: Setup) -> dict[str, Measured]:
    rows = {}
    for grad, mode in ((False, ""), (True, ", recording gradients")):
        times = compared(setup, grad=grad)
        bare = times.pop("bare")
        rows |= {f"{label}{mode}": Measured(ours, bare, "ms") for label, ours in times.items()}
    return rows
