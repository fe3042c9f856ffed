"""Measures of cross moments: against the one product they cannot do without, and what a sketch saves at what error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.models import language_model, random_batches, smollm2_texts
from tdprobe import CkaEstimator, registry
from tdprobe.estimator import score_all
from tdprobe.stats import Cross
from tdprobe.stats.state import State
from tdprobe.stream.batch import Batch
from tdprobe.stream.outliers import without_outliers

LAYERS, WIDTH, SKETCH, PORTION = 30, 576, 256, 512
MEASURES = ("cka", "procrustes", "cca", "svcca", "pwcca", "linear_regression", "gulp")
PAIR, MANY = "N = 10,000, width 256", f"{LAYERS} layers of width {WIDTH}"


def normal(layers: int, n: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, width, generator=generator) for _ in range(layers)]


def square(rows: Tensor) -> None:
    """Compute all products of all columns, the lower triangle as well."""
    _ = rows.mT @ rows


def triangle(rows: Sequence[Tensor], beside: Tensor) -> None:
    """Compute the products of each layer with itself and all later ones."""
    start = 0
    for x in rows:
        _ = x.mT @ beside[:, start:]
        start += x.shape[1]


def one_pair(rows: Sequence[Tensor]) -> None:
    x, y = rows
    _ = x.mT @ x, y.mT @ y, x.mT @ y


def filled(statistic: Cross, rows: Sequence[Tensor]) -> State:
    state = statistic.init(rows, torch.arange(0))
    for part in zip(*(x.split(PORTION) for x in rows), strict=True):
        state = statistic.update(state, part, torch.arange(len(part[0])))
    return state


def stream(statistic: Cross, rows: Sequence[Tensor]) -> Callable[[], None]:
    """Return one more update of a stream: the state it left last is gone, and its memory is free for the next one."""
    state, ids = filled(statistic, rows), torch.arange(len(rows[0]))

    def update() -> None:
        nonlocal state
        state = statistic.update(state, rows, ids)

    return update


def score(names: Sequence[str], state: State) -> dict[str, Tensor]:
    found = score_all({name: registry.get(name)() for name in names}, {Cross(): state})
    return {name: scores["score"] for name, scores in found.items()}


def model_rows(setup: Setup) -> list[Tensor]:
    """Return real rows of every third layer, without first tokens and outliers."""
    model: Any = language_model(setup)
    inputs = random_batches(model, 2) if setup.tiny else smollm2_texts(60)
    parts = []
    for batch in inputs:
        real = torch.ones_like(batch["input_ids"]) if setup.tiny else batch["attention_mask"]
        real = (real.bool() & (real.cumsum(1) > 1)).flatten()
        states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states[1:]
        parts.append([x.flatten(0, 1)[real] for x in (states if setup.tiny else states[::3])])
    rows = {str(layer): torch.cat(x) for layer, x in enumerate(zip(*parts, strict=True))}
    return list(without_outliers(Batch(rows, torch.arange(len(rows["0"]))), 4.0).rows.values())


def errors(rows: Sequence[Tensor], sketch: int) -> dict[str, Measured]:
    """Compare all pairs of different layers: mean absolute error, beside the mean value."""
    exact, sketched = (score(MEASURES, filled(statistic, rows)) for statistic in (Cross(), Cross(sketch=sketch)))
    other = ~torch.eye(len(rows), dtype=torch.bool)
    return {
        f"error of sketched {name}": Measured(
            [float((sketched[name] - exact[name])[other].abs().mean())], [float(exact[name][other].mean())], ""
        )
        for name in MEASURES
    }


def calls_of_a_pair(rows: list[Tensor]) -> dict[str, Callable[[], object]]:
    td = TensorDict({"data_a": rows[0], "data_b": rows[1]})
    return {
        "floor": partial(one_pair, rows),
        "biased": lambda: CkaEstimator()(td),
        "unbiased": lambda: CkaEstimator(unbiased=True)(td),
    }


def calls_of_many(rows: list[Tensor], sketch: int) -> dict[str, Callable[[], object]]:
    beside = torch.cat(rows, 1)
    return {
        "square": partial(square, beside),
        "triangle": partial(triangle, rows, beside),
        "exact": stream(Cross(), rows),
        "sketched": stream(Cross(sketch=sketch), rows),
    }


@bench(
    "cross",
    f"cross moments (CKA of a pair: {PAIR}; a portion of {PORTION} rows: {MANY}; errors: SmolLM2, every third layer)",
    {
        "CKA of a pair over the floor": Bar("ratio", 1.3),
        "unbiased CKA over the floor": Bar("ratio", 1.8),
        "exact over the upper triangle": Bar("ratio", 1.25),
        "exact over the whole product": Bar("ratio", 0.7),
        f"sketch={SKETCH} less than exact": Bar("gain", 3),
        "six measures less than one by one": Bar("gain", 1.1),
        **{f"error of sketched {name}": Bar("value") for name in MEASURES},
    },
)
@torch.no_grad()
def cross(setup: Setup) -> dict[str, Measured]:
    few, sketch = min(setup.rounds, 3), 8 if setup.tiny else SKETCH
    pair = interleave(calls_of_a_pair(normal(2, *((300, 16) if setup.tiny else (10000, 256)))), setup.rounds)
    shape = (3, 64, 16) if setup.tiny else (LAYERS, PORTION, WIDTH)
    many = interleave(calls_of_many(normal(*shape), sketch), few)
    rows = model_rows(setup)
    state, names = filled(Cross(), rows), MEASURES[1:]
    scoring = interleave(
        {"together": lambda: score(names, state), "alone": lambda: [score([name], state) for name in names]}, 1
    )
    return {
        "CKA of a pair over the floor": Measured(pair["biased"], pair["floor"]),
        "unbiased CKA over the floor": Measured(pair["unbiased"], pair["floor"]),
        "exact over the upper triangle": Measured(many["exact"], many["triangle"]),
        "exact over the whole product": Measured(many["exact"], many["square"]),
        f"sketch={SKETCH} less than exact": Measured(many["sketched"], many["exact"]),
        "six measures less than one by one": Measured(scoring["together"], scoring["alone"]),
        **errors(rows, sketch),
    }
