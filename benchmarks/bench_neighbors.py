"""Neighbours of many rows: against the distance products, and against sorting every distance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tensordict import TensorDict
from torch import Tensor

from benchmarks.distances import WIDTH, floor, gaussian, rank_all, sort_all
from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.peak import peak_mb
from tdprobe.latent import InformationImbalanceEstimator, LocalKnnDimensionEstimator, TwoNnDimensionEstimator

ESTIMATORS = {
    "twonn": TwoNnDimensionEstimator,
    "local_knn": LocalKnnDimensionEstimator,
    "imbalance": InformationImbalanceEstimator,
}
PEAKS = {"twonn": "score_twonn", "local_knn": "score_local_knn", "imbalance": "score_imbalance"}


def score(name: str, x: Tensor, y: Tensor) -> None:
    ESTIMATORS[name]()(TensorDict({"data": x, "data_a": x, "data_b": y}))


def score_twonn(n: int) -> None:
    score("twonn", x := gaussian(n), x)


def score_local_knn(n: int) -> None:
    score("local_knn", x := gaussian(n), x)


def score_imbalance(n: int) -> None:
    score("imbalance", gaussian(n), gaussian(n, seed=1))


@bench(
    "neighbors",
    f"nearest neighbours of Gaussian rows (width {WIDTH}; N = 16,000, and N = 8,000 against sorting every distance)",
    {
        "twonn over the floor": Bar("ratio", 2),
        "local_knn over the floor": Bar("ratio", 2),
        "imbalance over the floor (2 inputs)": Bar("ratio", 2.5),
        "twonn less than sorting": Bar("gain", 6),
        "local_knn less than sorting": Bar("gain", 6),
        "imbalance less than ranking": Bar("gain", 6),
        "twonn peak memory": Bar("value", 1000),
        "local_knn peak memory": Bar("value", 1000),
        "imbalance peak memory": Bar("value", 1000),
    },
)
def neighbors(setup: Setup) -> dict[str, Measured]:
    n, smaller = (300, 200) if setup.tiny else (16000, 8000)
    x, y = gaussian(n), gaussian(n, seed=1)
    few = min(setup.rounds, 3)
    whole = interleave({"floor": lambda: floor([x]), **_calls(x, y)}, few)
    both = interleave({"floor": lambda: floor([x, y])}, few)["floor"]
    part_x, part_y = x[:smaller], y[:smaller]
    textbook = {"sorting": lambda: sort_all(part_x), "ranking": lambda: rank_all(part_x, part_y)}
    part = interleave({**textbook, **_calls(part_x, part_y)}, few)
    rows = {
        "twonn over the floor": Measured(whole["twonn"], whole["floor"]),
        "local_knn over the floor": Measured(whole["local_knn"], whole["floor"]),
        "imbalance over the floor (2 inputs)": Measured(whole["imbalance"], both),
        "twonn less than sorting": Measured(part["twonn"], part["sorting"]),
        "local_knn less than sorting": Measured(part["local_knn"], part["sorting"]),
        "imbalance less than ranking": Measured(part["imbalance"], part["ranking"]),
    }
    for name, function in PEAKS.items():
        inputs = (1 + (name == "imbalance")) * n * WIDTH * 4 / 1e6
        peak = peak_mb("benchmarks.bench_neighbors", function, n)
        rows[f"{name} peak memory"] = Measured([peak], [inputs], "MB")
    return rows


def _calls(x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    return {name: partial(score, name, x, y) for name in ESTIMATORS}
