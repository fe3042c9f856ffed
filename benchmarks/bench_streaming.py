"""What six measures over one pass cost beside the forward pass that feeds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.models import language_model, random_batches
from benchmarks.peak import peak_mb
from tdprobe import LayerScoring

LAYERS = r"model\.layers\.\d+$"
MEASURES = ("cka", "information_imbalance", "mutual_knn", "twonn", "mle", "participation_ratio")
# 16 x 32 tokens each; banks hold half of them.
BATCHES = 16
TIME, MEMORY = "8,192 tokens, 30 layers, six measures", "its peak memory above the model"


def forward(model: nn.Module, inputs: Sequence[dict[str, Tensor]]) -> None:
    for batch in inputs:
        model(**batch)


def stream(model: nn.Module, inputs: Sequence[dict[str, Tensor]]) -> Any:
    """Stream batches through all measures, from entering the block to the table."""
    with LayerScoring(LAYERS, MEASURES, skip_first=0, max_norm=None).prepare(model) as hooked:
        forward(hooked, inputs)
    return hooked.hooking_context.scores()


@torch.no_grad()
def hold(tiny: int) -> None:
    """Load the model and run it, so that its weights are in memory and not only on disk."""
    torch.set_num_threads(1)
    model = language_model(Setup(tiny=bool(tiny)))
    forward(model, random_batches(model, 1))


@torch.no_grad()
def hold_and_stream(tiny: int) -> None:
    """Load the model and stream all measures."""
    torch.set_num_threads(1)
    model = language_model(Setup(tiny=bool(tiny)))
    stream(model, random_batches(model, 2 if tiny else BATCHES))


@bench(
    "streaming",
    f"LayerScoring with {', '.join(MEASURES)}, and the table, over bare forwards",
    {TIME: Bar("ratio", 2.0), MEMORY: Bar("excess", 1500)},
)
@torch.no_grad()
def streaming(setup: Setup) -> dict[str, Measured]:
    model = language_model(setup)
    inputs = random_batches(model, 2 if setup.tiny else BATCHES)
    contenders = {"bare": lambda: forward(model, inputs), "ours": lambda: stream(model, inputs)}
    times = interleave(contenders, min(setup.rounds, 2))
    held, peak = (peak_mb(__name__, name, int(setup.tiny)) for name in ("hold", "hold_and_stream"))
    return {TIME: Measured(times["ours"], times["bare"]), MEMORY: Measured([peak], [held], "MB")}
