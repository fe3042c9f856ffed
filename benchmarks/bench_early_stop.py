"""What ending the forward pass after the last layer that is asked for saves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.models import language_model, random_batches
from tdprobe import ActivationCaching


def stop_after(model: nn.Module, layer: int, inputs: dict[str, Tensor]) -> None:
    with ActivationCaching(rf"model\.layers\.{layer}$", early_stop=True).prepare(model) as hooked:
        hooked(**inputs)


@bench(
    "early_stop",
    "ActivationCaching(early_stop=True) of layer 9 of SmolLM2 (ten of 30 layers run) over the full forward",
    {"16 x 32 random tokens": Bar("ratio", 0.36)},
)
@torch.no_grad()
def early_stop(setup: Setup) -> dict[str, Measured]:
    model = language_model(setup)
    (inputs,) = random_batches(model, 1)
    layer = 0 if setup.tiny else 9
    contenders = {"full": lambda: model(**inputs), "ours": lambda: stop_after(model, layer, inputs)}
    times = interleave(contenders, setup.rounds)
    return {"16 x 32 random tokens": Measured(times["ours"], times["full"])}
