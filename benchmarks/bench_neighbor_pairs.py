"""Information imbalance of all layer pairs at once, against one pair at a time by rank matrices."""

from __future__ import annotations

from benchmarks.distances import floor, gaussian, rank_all
from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from tdprobe.stats import Neighbors

LAYERS, WIDTH = 30, 576
# Pairs that are timed by sorting; their time is scaled to all 435.
SAMPLE = 4


@bench(
    "neighbor_pairs",
    f"{LAYERS} layers of {WIDTH} columns: imbalance of all pairs (N = 2048), and every estimator from one pass",
    {
        f"imbalance over 435 rankings ({SAMPLE} timed)": Bar("gain", 20),
        "imbalance over the floor": Bar("ratio"),
        "all three over imbalance alone": Bar("ratio", 1.5),
    },
)
def neighbor_pairs(setup: Setup) -> dict[str, Measured]:
    n, few = (64, 1) if setup.tiny else (2048, min(setup.rounds, 3))
    layers = [gaussian(n, WIDTH, seed) for seed in range(LAYERS)]
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
