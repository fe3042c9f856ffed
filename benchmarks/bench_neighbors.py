"""Neighbours of many rows, and of many layers: against the distance products, and against sorting every distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.peak import peak_mb
from tdprobe.latent import InformationImbalanceEstimator, LocalKnnDimensionEstimator, TwoNnDimensionEstimator
from tdprobe.stats import Neighbors

WIDTH, LAYERS, LAYER_WIDTH, BLOCK = 256, 30, 576, 128
# Pairs that are timed by sorting; their time is scaled to all 435.
SAMPLE = 4
ESTIMATORS = {
    "twonn": TwoNnDimensionEstimator,
    "local_knn": LocalKnnDimensionEstimator,
    "imbalance": InformationImbalanceEstimator,
}
PEAKS = {"twonn": "score_twonn", "local_knn": "score_local_knn", "imbalance": "score_imbalance"}


def gaussian(n: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def score(name: str, x: Tensor, y: Tensor) -> None:
    ESTIMATORS[name]()(TensorDict({"data": x, "data_a": x, "data_b": y}))


def score_twonn(n: int) -> None:
    score("twonn", x := gaussian(n), x)


def score_local_knn(n: int) -> None:
    score("local_knn", x := gaussian(n), x)


def score_imbalance(n: int) -> None:
    score("imbalance", gaussian(n), gaussian(n, seed=1))


def floor(inputs: Sequence[Tensor]) -> None:
    """Compute the bare squared distances of all rows, a block at a time: what nobody can do without."""
    for x in inputs:
        squares, out = x.square().sum(1), torch.empty(BLOCK, len(x))
        for rows in x.split(BLOCK):
            torch.addmm(squares, rows, x.mT, alpha=-2, out=out[: len(rows)])


def sort_all(x: Tensor) -> Tensor:
    """Compute all distances and sort them, the textbook way to neighbours."""
    return torch.cdist(x, x).fill_diagonal_(torch.inf).sort(1).values[:, :2]


def rank_all(x: Tensor, y: Tensor) -> list[Tensor]:
    """Compute both rank matrices, the textbook way to information imbalance."""
    order = [torch.cdist(z, z).fill_diagonal_(-torch.inf).argsort(1) for z in (x, y)]
    ranks = [found.argsort(1) for found in order]
    return [2 / len(x) * ranks[b].gather(1, order[a][:, 1:2]).double().mean() for a, b in ((0, 1), (1, 0))]


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


@bench(
    "neighbor_pairs",
    f"{LAYERS} layers of {LAYER_WIDTH} columns: imbalance of all pairs (N = 2048), and every estimator from one pass",
    {
        f"imbalance over 435 rankings ({SAMPLE} timed)": Bar("gain", 20),
        "imbalance over the floor": Bar("ratio"),
        "all three over imbalance alone": Bar("ratio", 1.5),
    },
)
def neighbor_pairs(setup: Setup) -> dict[str, Measured]:
    n, few = (64, 1) if setup.tiny else (2048, min(setup.rounds, 3))
    layers = [gaussian(n, LAYER_WIDTH, seed) for seed in range(LAYERS)]
    k = max(2, int(n**0.5))
    times = interleave(
        {
            "floor": lambda: floor(layers),
            "ours": lambda: Neighbors(imbalance=True).of_rows(layers),
            "all": lambda: Neighbors((1, 2, k, 2 * k), imbalance=True).of_rows(layers),
            "pairs": lambda: [rank_all(layers[i], layers[i + 1]) for i in range(SAMPLE)],
        },
        few,
    )
    pairs = LAYERS * (LAYERS - 1) // 2
    return {
        f"imbalance over 435 rankings ({SAMPLE} timed)": Measured(
            times["ours"], [value * pairs / SAMPLE for value in times["pairs"]]
        ),
        "imbalance over the floor": Measured(times["ours"], times["floor"]),
        "all three over imbalance alone": Measured(times["all"], times["ours"]),
    }
