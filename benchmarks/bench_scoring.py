"""What scoring all layers costs beside the forward pass that it watches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.models import language_model, random_batches, text_batches
from tdprobe import LayerScoring

LAYERS = r"model\.layers\.\d+$"
# More than one, because the row buffer holds a portion back; asking for scores counts the last one too.
BATCHES = 3
RANDOM, TEXT = "16 x 32 random tokens", "16 texts, padded, skip_first=1"


def score(model: nn.Module, inputs: Sequence[dict[str, Tensor]], **options: Any) -> Any:
    """Stream batches through streaming CKA, from entering the block to the table."""
    with LayerScoring(LAYERS, **options).prepare(model) as hooked:
        for batch in inputs:
            hooked(**batch)
    context = hooked.hooking_context
    context.scores()
    return context


def forward(model: nn.Module, inputs: Sequence[dict[str, Tensor]]) -> None:
    for batch in inputs:
        model(**batch)


def require_updates(context: Any) -> None:
    """Stop if the bench would measure less than it says."""
    (state,) = context.scorer.states().values()
    counted = int(state.n) + context.scorer.n_dropped
    if counted != context.n_rows or int(state.batches) < BATCHES - 1:
        raise RuntimeError(f"{counted} of {context.n_rows} rows were counted in {int(state.batches)} updates")


@bench(
    "scoring",
    f"LayerScoring (streaming CKA, 30 layers of SmolLM2, {BATCHES} batches and the table) over bare forwards",
    {RANDOM: Bar("ratio", 1.15), TEXT: Bar("ratio", 1.15)},
)
@torch.no_grad()
def scoring(setup: Setup) -> dict[str, Measured]:
    model = language_model(setup)
    return {
        RANDOM: compared(model, random_batches(model, BATCHES), setup, skip_first=0),
        TEXT: compared(model, text_batches(model, setup, BATCHES), setup),
    }


def compared(model: nn.Module, inputs: Sequence[dict[str, Tensor]], setup: Setup, **options: Any) -> Measured:
    require_updates(score(model, inputs, **options))
    contenders = {"bare": lambda: forward(model, inputs), "ours": lambda: score(model, inputs, **options)}
    times = interleave(contenders, setup.rounds)
    return Measured(times["ours"], times["bare"])
