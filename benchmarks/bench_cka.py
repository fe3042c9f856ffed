"""All layer pairs at once, against one pair at a time and against the products that nobody can do without."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.peak import peak_mb
from tdprobe import CkaEstimator
from tdprobe.latent.representation_similarity.cka import cka_matrix
from tdprobe.registry import streaming

LAYERS, WIDTH = 30, 576
# One-shot calls that are timed; their time is scaled to all pairs.
SAMPLE = 20


def layers(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, WIDTH, generator=generator) for _ in range(LAYERS)]


def all_pairs(n: int) -> None:
    """Make rows and score them: what the memory bench runs."""
    cka_matrix(layers(n))


def one_by_one(rows: list[Tensor]) -> None:
    """Score a sample of pairs, a one-shot call for each."""
    estimator = CkaEstimator()
    for index in range(SAMPLE):
        a, b = rows[index % LAYERS], rows[(index * 7 + 3) % LAYERS]
        estimator(TensorDict({"data_a": a, "data_b": b}))


def minibatches(rows: list[Tensor]) -> Tensor:
    """Score a stream of 512 rows at a time, one number kept for each pair."""
    estimator, ids = streaming("cka"), torch.arange(len(rows[0]))
    statistic = estimator.statistic()
    state = statistic.init(rows, ids)
    for part in ids.split(512):
        state = statistic.update(state, [x[part[0] : part[-1] + 1] for x in rows], part)
    return estimator.score(state)["score"]


def floor(rows: list[Tensor], grams: Tensor) -> Tensor:
    """Compute the bare products: a Gram per layer, then all pairs as one (l, n^2) x (n^2, l) product."""
    for x, gram in zip(rows, grams, strict=True):
        torch.mm(x, x.mT, out=gram)
    flat = grams.flatten(1)
    return flat @ flat.mT


@bench(
    "cka",
    f"exact linear CKA of {LAYERS} x {LAYERS} layers of width {WIDTH}, N = 2048 rows (memory: N = 8192)",
    {
        f"over 900 calls ({SAMPLE} timed, scaled)": Bar("gain", 15),
        "over the floor": Bar("ratio", 1.5),
        "unbiased, over the floor": Bar("ratio", 1.5),
        "unbiased, CPU time": Bar("value", 2.9),
        "minibatches of 512, CPU time": Bar("value", 0.45),
        "peak memory (reference: rows)": Bar("value", 1500),
    },
)
def cka(setup: Setup) -> dict[str, Measured]:
    n, large = (64, 64) if setup.tiny else (2048, 8192)
    rows, grams = layers(n), torch.empty(LAYERS, n, n)
    times = interleave(
        {
            "floor": lambda: floor(rows, grams),
            "ours": lambda: cka_matrix(rows),
            "unbiased": lambda: cka_matrix(rows, unbiased=True),
            "minibatch": lambda: minibatches(rows),
            "calls": lambda: one_by_one(rows),
        },
        setup.rounds,
    )
    calls = [value * LAYERS**2 / SAMPLE for value in times["calls"]]
    peak = peak_mb("benchmarks.bench_cka", "all_pairs", large)
    return {
        f"over 900 calls ({SAMPLE} timed, scaled)": Measured(times["ours"], calls),
        "over the floor": Measured(times["ours"], times["floor"]),
        "unbiased, over the floor": Measured(times["unbiased"], times["floor"]),
        "unbiased, CPU time": Measured(times["unbiased"], times["floor"]),
        "minibatches of 512, CPU time": Measured(times["minibatch"], times["floor"]),
        "peak memory (reference: rows)": Measured([peak], [LAYERS * large * WIDTH * 4 / 1e6], "MB"),
    }
