"""Every measure that reads the neighbour table: by itself at N = 10,000, and six together for all layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarks.distances import WIDTH, floor, gaussian
from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.models import layer_rows
from benchmarks.peak import peak_mb
from tdprobe.estimator import score_all
from tdprobe.registry import get
from tdprobe.stats import Neighbors, NeighborTable, Reservoir

TOGETHER = ("twonn", "mle", "local_knn", "gride", "information_imbalance", "mutual_knn")


def one_shot(name: str, x: Tensor, y: Tensor) -> None:
    get(name)()(TensorDict({"data": x, "data_a": x, "data_b": y}))


def twonn_alone(n: int) -> None:
    one_shot("twonn", x := gaussian(n), x)


def imbalance_alone(n: int) -> None:
    one_shot("information_imbalance", gaussian(n), gaussian(n, seed=1))


def binary_codes(n: int, seed: int) -> Tensor:
    """Return rows of zeros and 16 ones, such as say which latents of a sparse autoencoder are active."""
    active = gaussian(n, seed=seed).topk(16).indices
    return torch.zeros(n, WIDTH).scatter_(1, active, 1.0)


def together(layers: Sequence[Tensor]) -> None:
    """Score a bank with all six, as a stream does."""
    statistic, ids = Reservoir(len(layers[0])), torch.arange(len(layers[0]))
    state = statistic.update(statistic.init(layers, ids), layers, ids)
    score_all({name: get(name)(bank_size=statistic.size, mode="robust") for name in TOGETHER}, {statistic: state})


def one_pass(layers: Sequence[Tensor], imbalance: bool) -> NeighborTable:
    """Find what the six read, and no more: the neighbours of all ranks, and the ranks of nearest rows elsewhere."""
    k = int(len(layers[0]) ** 0.5)
    powers = [rank for rank in (1, 2, 4, 8, 16, 32, 64) if rank < len(layers[0])]
    ranks = tuple(sorted({*range(1, 21), *powers, k, 2 * k}))
    return Neighbors(ranks, imbalance=imbalance, places=10).of_rows(layers)


@bench(
    "neighbor_table",
    f"one neighbour table for all (width {WIDTH}, N = 10,000; 30 layers of SmolLM2, 4,096 tokens of text)",
    {
        # 1.6 s of 0.90 s, 2.0 s of 0.90 s and 4 s of 1.79 s, on the machine on which the bars were set.
        "twonn over one product": Bar("ratio", 1.78),
        "mle over one product": Bar("ratio", 2.22),
        "imbalance over two products": Bar("ratio", 2.23),
        "twonn peak memory": Bar("value", 150),
        "imbalance peak memory": Bar("value", 250),
        "six over nearest distances alone": Bar("ratio", 1.5),
        "six over these and ranks elsewhere": Bar("ratio"),
        "six over 30 products": Bar("ratio"),
        # Layers of a model agree on most nearest rows. Here each has its own, which the others rank one by one.
        "six over distances, unrelated layers": Bar("ratio"),
        # Rows of which 16 columns are 1 and the others 0: a third of all points are as far as the one to rank.
        "imbalance of binary codes over two products": Bar("ratio"),
    },
)
def neighbor_table(setup: Setup) -> dict[str, Measured]:
    n, rows, few = (300, 64, 1) if setup.tiny else (10000, 4096, min(setup.rounds, 3))
    x, y = gaussian(n), gaussian(n, seed=1)
    single = interleave(
        {
            "floor": lambda: floor([x]),
            "floors": lambda: floor([x, y]),
            **{name: partial(one_shot, name, x, y) for name in ("twonn", "mle", "information_imbalance")},
        },
        few,
    )
    peaks = [peak_mb("benchmarks.bench_neighbor_table", name, n) for name in ("twonn_alone", "imbalance_alone")]
    layers = layer_rows(setup, rows)
    times = interleave(_joint(layers), few)
    unrelated = [gaussian(rows, layers[0].shape[1], seed) for seed in range(len(layers))]
    apart = interleave({name: call for name, call in _joint(unrelated).items() if name in ("distances", "six")}, 1)
    codes = [binary_codes(rows, seed) for seed in range(2)]
    tied = interleave(
        {"floors": lambda: floor(codes), "imbalance": lambda: one_shot("information_imbalance", *codes)}, few
    )
    return {
        "twonn over one product": Measured(single["twonn"], single["floor"]),
        "mle over one product": Measured(single["mle"], single["floor"]),
        "imbalance over two products": Measured(single["information_imbalance"], single["floors"]),
        "twonn peak memory": Measured([peaks[0]], [n * WIDTH * 4 / 1e6], "MB"),
        "imbalance peak memory": Measured([peaks[1]], [2 * n * WIDTH * 4 / 1e6], "MB"),
        "six over nearest distances alone": Measured(times["six"], times["distances"]),
        "six over these and ranks elsewhere": Measured(times["six"], times["table"]),
        "six over 30 products": Measured(times["six"], times["floor"]),
        "six over distances, unrelated layers": Measured(apart["six"], apart["distances"]),
        "imbalance of binary codes over two products": Measured(tied["imbalance"], tied["floors"]),
    }


def _joint(layers: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    return {
        "floor": lambda: floor(layers),
        "distances": lambda: one_pass(layers, imbalance=False),
        "table": lambda: one_pass(layers, imbalance=True),
        "six": lambda: together(layers),
    }
