"""Measures over all pairs of samples of all layers, against the products that nobody can do without."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.bench_cka import LAYERS, WIDTH, floor, layers
from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.peak import peak_mb
from tdprobe.estimator import Estimator, score_all
from tdprobe.latent import CkaEstimator, CknnaEstimator, DistanceCorrelationEstimator, RsaEstimator
from tdprobe.stats import Reservoir

# Pairs that are timed one by one; their time is scaled to all 435.
SAMPLE = 2
MEASURES: dict[str, Estimator] = {
    "rbf cka": CkaEstimator(kernel="rbf", mode="robust"),
    "distance correlation": DistanceCorrelationEstimator(),
    "rsa, Pearson": RsaEstimator(rdm="euclidean", comparison="pearson"),
    "rsa, Spearman": RsaEstimator(rdm="euclidean"),
    "cknna": CknnaEstimator(),
}


def run(rows: list[Tensor], *names: str) -> None:
    """Score all pairs of layers with some measures."""
    bank, ids = Reservoir(max(8192, len(rows[0]))), torch.arange(len(rows[0]))
    chosen = {name: MEASURES[name] for name in names}
    state = bank.update(bank.init(rows, ids), rows, ids)
    score_all(chosen, {estimator.statistic(): state for estimator in chosen.values()})


def all_measures(n: int) -> None:
    """Make rows and score them: what the memory bench runs."""
    run(layers(n), *MEASURES)


def rbf_pairs(rows: list[Tensor]) -> None:
    """Score a sample of pairs by whole centred kernels, as they are written down."""
    for i in range(SAMPLE):
        kernels = [torch.cdist(x, x).square() for x in rows[i : i + 2]]
        kernels = [torch.exp(-k / (2 * k.median())) for k in kernels]
        kernels = [k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in kernels]
        (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())


@bench(
    "kernels",
    f"kernels and distances of {LAYERS} layers of width {WIDTH}, all pairs, N = 2048 (memory: N = 4096)",
    {
        **{f"{name}, over the floor": Bar("ratio") for name in MEASURES},
        "rbf, rsa and distances in one pass over the sum": Bar("ratio", 0.8),
        f"rbf cka over 435 pairs ({SAMPLE} timed)": Bar("gain", 15),
        "peak memory (reference: rows)": Bar("value", 1500),
    },
)
def kernels(setup: Setup) -> dict[str, Measured]:
    n, large = (64, 64) if setup.tiny else (2048, 4096)
    rows, grams = layers(n), torch.empty(LAYERS, n, n)
    shared = [name for name in MEASURES if name != "cknna"]
    contenders = {name: lambda name=name: run(rows, name) for name in MEASURES}
    contenders |= {"floor": lambda: floor(rows, grams), "shared": lambda: run(rows, *shared)}
    times = interleave(contenders | {"pairs": lambda: rbf_pairs(rows)}, min(setup.rounds, 3))
    alone = [sum(parts) for parts in zip(*(times[name] for name in shared), strict=True)]
    pairs = [value * LAYERS * (LAYERS - 1) / 2 / SAMPLE for value in times["pairs"]]
    peak = peak_mb("benchmarks.bench_kernels", "all_measures", large)
    return {
        **{f"{name}, over the floor": Measured(times[name], times["floor"]) for name in MEASURES},
        "rbf, rsa and distances in one pass over the sum": Measured(times["shared"], alone),
        f"rbf cka over 435 pairs ({SAMPLE} timed)": Measured(times["rbf cka"], pairs),
        "peak memory (reference: rows)": Measured([peak], [LAYERS * large * WIDTH * 4 / 1e6], "MB"),
    }
