"""What pair scores are when the rows of one layer have nothing to do with those of the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.registry import Spec
from tdprobe.stats.reservoir import ReservoirState
from tdprobe.stats.state import layer_list
from tdprobe.stream.batch import Batch


@dataclass(frozen=True)
class Null:
    """Hold how a pair estimator scores unrelated rows.

    Attributes:
        mean: Mean over permutations, (l, l).
        sd: Standard deviation over permutations, (l, l).
        p: Share of permutations, the observed one among them, that score at least as similar, (l, l).
    """

    mean: Tensor
    sd: Tensor
    p: Tensor


def permutation_null(
    bank: ReservoirState,
    count: int,
    score: Callable[[Batch], Mapping[str, Tensor]],
    chunk: int | None = None,
    seed: int = 0,
) -> dict[str, Float[Tensor, "r l l"]]:
    """Score every layer against the shuffled rows of every layer.

    One permutation of the rows serves all pairs of layers, so that their null scores can be compared.

    Args:
        bank: The rows.
        count: How many permutations.
        score: Scores a batch; called with layers followed by shuffled layers.
        chunk: Most layers of either kind in a call; all by default.
        seed: Of the permutations.

    Returns:
        The null scores by label: row layer as it is, column layer shuffled.

    References:
        Good 2005, Permutation, parametric and bootstrap tests of hypotheses.
    """
    rows, generator = layer_list(bank.rows), torch.Generator().manual_seed(seed)
    places = torch.arange(len(rows), device="cpu").split(chunk or len(rows))
    drawn: dict[str, list[Tensor]] = {}
    for _ in range(count):
        order = torch.randperm(len(bank.ids), generator=generator, device="cpu")
        found: dict[str, Tensor] = {}
        for plain, shuffled in product(places, places):
            layers = [rows[i] for i in plain] + [rows[i].index_select(0, order.to(rows[i].device)) for i in shuffled]
            scores = score(Batch({str(place): x for place, x in enumerate(layers)}, bank.ids))
            for label, values in scores.items():
                whole = found.setdefault(label, values.new_empty(len(rows), len(rows)))
                whole[plain.unsqueeze(1), shuffled] = values[: len(plain), len(plain) :]
        for label, values in found.items():
            drawn.setdefault(label, []).append(values)
    return {label: torch.stack(values) for label, values in drawn.items()}


def compare_with_null(scores: Float[Tensor, "l l"], null: Float[Tensor, "r l l"], spec: Spec) -> Null:
    """Tell how unusual scores are among null scores, one-sided: towards more similar.

    ``p = (1 + #{null at least as similar}) / (r + 1)``, so the smallest p of r permutations is ``1 / (r + 1)``.
    """
    similar = null <= scores if spec.larger_is_similar is False else null >= scores
    p = (1.0 + similar.sum(0).double()) / (len(null) + 1)
    unknown = scores.isnan() | null.isnan().any(0)
    sd = null.std(0) if len(null) > 1 else torch.full_like(scores, torch.nan)
    return Null(null.mean(0), sd, p.masked_fill(unknown, torch.nan))
