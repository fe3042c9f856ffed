"""One row of test data for each estimator of the registry: how the contract is tested on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

N, WIDTHS = 60, (5, 4, 7)


@dataclass(frozen=True)
class Row:
    """Say how an estimator is put to the test.

    Args:
        reference: Plain float64 definition: of one layer, of two, or of a layer and targets.
        least: Fewest rows that give a score; with one less it is an error, or NaN.
        options: Constructor arguments under which a stream of several updates is the exact value.
        unaffected: Changes that are not declared and keep this score all the same, with no promise.
        shift: Offset, in standard deviations, that costs no digits.
        bank: Whether rows are kept, so that results are the same to the bit in any order.
    """

    reference: Callable[..., Any] | None
    least: int
    options: Mapping[str, Any] = field(default_factory=dict)
    unaffected: frozenset[str] = frozenset()
    shift: float = 1000.0


def centred(x):
    return x - x.mean(0)


def linear_cka(x, y):
    x, y = centred(x), centred(y)
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def information_imbalance(x, y):
    from neighbor_tools import imbalance

    return imbalance(x, y)


def two_nn(x):
    from neighbor_tools import neighbour_distances

    near = neighbour_distances(x, (1, 2))
    mu = (near[:, 1] / near[:, 0]).log().sort().values[:-1]
    empirical = -torch.log1p(-torch.arange(1, len(mu) + 1, dtype=torch.float64) / (len(mu) + 1))
    return (mu * empirical).sum() / mu.square().sum()


ROWS: dict[str, Row] = {
    "cka": Row(linear_cka, least=1),
    "information_imbalance": Row(information_imbalance, least=2),
    "twonn": Row(two_nn, least=3),
    "local_knn": Row(None, least=5),
}
