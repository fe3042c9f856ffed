"""Neighbours of many rows, one estimator at a time, against tdhook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from benchmarks.distances import WIDTH, gaussian
from benchmarks.harness import Bar, Measured, Setup, bench, cpu_time
from tdprobe import latent
from tdprobe.stats import Neighbors

LAYERS = 30
# Pairs that the peer is timed on; their time is scaled to all 435.
SAMPLE = 3
TWONN, LOCAL_KNN = "twonn, N = 16,000", "local_knn, N = 16,000"
# Four rank matrices of 16,000 x 16,000 int64 take the peer beyond 8 GB, where it was killed.
IMBALANCE = "imbalance, N = 8,000 (16,000: > 8 GB)"
PAIRS = f"imbalance of 435 pairs ({SAMPLE} timed)"
CLASSES = {
    TWONN: "TwoNnDimensionEstimator",
    LOCAL_KNN: "LocalKnnDimensionEstimator",
    IMBALANCE: "InformationImbalanceEstimator",
}


def peer() -> ModuleType | None:
    """Import the peer; ``None`` if it is not installed."""
    try:
        return import_module("tdhook.latent")
    except ImportError:
        return None


def call(estimators: Any, label: str, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Return the one-shot call that both libraries document."""
    estimator = getattr(estimators, CLASSES[label])()
    return lambda: estimator(TensorDict({"data": x, "data_a": x, "data_b": y}))


def all_pairs(layers: list[Tensor]) -> None:
    Neighbors(imbalance=True).of_rows(layers)


@bench(
    "tdhook",
    f"against tdhook 0.1.3 on Gaussian rows (width {WIDTH}; one call of the peer each)",
    {TWONN: Bar("gain", 6), LOCAL_KNN: Bar("gain", 6), IMBALANCE: Bar("gain", 6), PAIRS: Bar("gain", 20)},
)
def tdhook(setup: Setup) -> Mapping[str, Measured | str]:
    other = peer()
    if other is None:
        return dict.fromkeys([*CLASSES, PAIRS], "peer not installed")
    whole, part, n = (200, 100, 64) if setup.tiny else (16000, 8000, 2048)
    rows: dict[str, Measured | str] = {}
    for label in CLASSES:
        size = part if label == IMBALANCE else whole
        x, y = gaussian(size), gaussian(size, seed=1)
        # Half a minute of work needs no warm-up; a small call loads what is loaded once.
        for estimators in (latent, other):
            call(estimators, label, x[:64], y[:64])()
        ours = cpu_time(call(latent, label, x, y))
        rows[label] = Measured([ours], [cpu_time(call(other, label, x, y))])
    layers = [gaussian(n, WIDTH, seed) for seed in range(LAYERS)]
    calls = [call(other, IMBALANCE, layers[i], layers[i + 1]) for i in range(SAMPLE)]
    ours = cpu_time(partial(all_pairs, layers))
    theirs = sum(map(cpu_time, calls)) * (LAYERS * (LAYERS - 1) // 2) / SAMPLE
    return rows | {PAIRS: Measured([ours], [theirs])}
