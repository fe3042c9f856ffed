"""Distances between all rows: what cannot be done without, and the textbook way to neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH, BLOCK = 256, 128


def gaussian(n: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


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
