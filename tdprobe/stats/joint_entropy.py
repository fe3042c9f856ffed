"""Entropies of products of kernel matrices: all pairs of layers of a bank, found once for all estimators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from tensordict import TensorClass
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.kernel_rows import KernelRows, check_kernel
from tdprobe.stats.reservoir import ReservoirState
from tdprobe.stats.spectrum import CONSTANT, check_order, renyi_entropy, spectral_shares
from tdprobe.stats.state import Derivation, all_finite, layer_list

# Most rows of a tile, and bytes for the tiles of all layers together.
TILE, BUDGET = 128, 64 * 2**20


class JointEntropyTable(TensorClass):
    """Hold what `JointEntropy` found in l layers, in nats; NaN for layers that are not finite or do not vary.

    Attributes:
        n: Rows behind it, int64.
        own: Entropy of each layer, ``(*lead, l)`` float64.
        joint: Entropy of each pair, ``(*lead, l, l)`` float64.
        shuffled: The same with the rows of one layer shuffled, ``(*lead, p, l, l)`` float64, symmetric.
        directed: Rows that have a direction in the space of the kernel, ``(*lead, l)`` float64.
        finite: Whether a layer holds finite numbers only, ``(*lead, l)`` bool.
    """

    n: Tensor
    own: Tensor
    joint: Tensor
    shuffled: Tensor
    directed: Tensor
    finite: Tensor

    def expected(self) -> Float[Tensor, "*lead l l"]:
        """Compute the joint entropy of order 2 that shuffles have on average, from the entropies of single layers.

        The logarithm is taken of the mean over all n! shuffles, in which every entry beside the diagonal meets every
        other: ``sum A_ij^2 B_ij^2`` has the mean ``n_a n_b / n + (a - n_a)(b - n_b) / (n (n - 1))``, with
        ``a = sum A_ij^2`` and ``n_a`` the rows with a direction, for which ``A_ii = 1``.
        """
        n, diagonal = self.n.double(), self.directed
        beside = diagonal.square() * (-self.own).exp() - diagonal
        traces = diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2) / n
        squares = traces + beside.unsqueeze(-1) * beside.unsqueeze(-2) / (n * (n - 1))
        return 2 * traces.log() - squares.log()


@dataclass(frozen=True)
class JointEntropy(Derivation):
    """Say which joint entropies to find.

    ``S(A o B / tr(A o B))`` of the elementwise product of two kernel matrices that are scaled to a unit diagonal. Of
    order 2 all pairs come out of one product of squared tiles, and no n x n matrix is held. Other orders take the
    eigenvalues of one n x n matrix per pair (and two per pair and shuffle), with three such matrices in memory.

    Args:
        alpha: Order, above 0.
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: Of ``"rbf"``, in units of the median distance.
        center: Subtract the mean, in the space of the kernel.
        normalize_rows: Divide rows by their length first.
        permutations: How often to shuffle.
        seed: Of the shuffles; all pairs have the same ones.

    References:
        Sanchez Giraldo, Rao, Principe 2015, Measures of entropy from data using infinitely divisible kernels.
    """

    alpha: float = 2.0
    kernel: str = "rbf"
    bandwidth: float = 1.0
    center: bool = False
    normalize_rows: bool = False
    permutations: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check order and kernel."""
        check_order(self.alpha)
        check_kernel(self.kernel, self.bandwidth)

    def joined(self, other: Any) -> JointEntropy | None:
        """Return what serves both, or ``None`` where kernels, orders or shuffles differ."""
        if not isinstance(other, JointEntropy):
            return None
        shuffles = {item.seed for item in (self, other) if item.permutations}
        if len(shuffles) > 1 or replace(self, permutations=0, seed=0) != replace(other, permutations=0, seed=0):
            return None
        seed = shuffles.pop() if shuffles else self.seed
        return replace(self, permutations=max(self.permutations, other.permutations), seed=seed)

    def __call__(self, state: ReservoirState) -> JointEntropyTable:
        """Find the entropies in the rows of a bank."""
        layers, n = layer_list(state.rows), len(state.ids)
        lead, device = layers[0].shape[:-2], layers[0].device

        def empty(*shape: int) -> Tensor:
            return torch.full((*lead, *shape), torch.nan, dtype=torch.float64, device=device)

        count = len(layers)
        table = JointEntropyTable(
            n=state.n,
            own=empty(count),
            joint=empty(count, count),
            shuffled=empty(self.permutations, count, count),
            directed=empty(count),
            finite=torch.stack([all_finite(x) for x in layers], -1),
        )
        # The caller's autograd, autocast and inference mode are the model's.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            orders = self._shuffles(n, device)
            for index in product(*map(range, lead)):
                self._fill(table, index, [x[index].detach() for x in layers], orders)
        return table

    def _shuffles(self, n: int, device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randperm(n, generator=generator, device="cpu").to(device) for _ in range(self.permutations)]

    def _fill(self, table: JointEntropyTable, index: tuple[int, ...], rows: list[Tensor], orders: list[Tensor]) -> None:
        options = {"center": self.center, "normalize_rows": self.normalize_rows}
        kernels = {
            i: KernelRows(x, self.kernel, self.bandwidth, **options)
            for i, x in enumerate(rows)
            if bool(table.finite[(*index, i)])
        }
        kernels = {i: k for i, k in kernels.items() if bool(k.diagonal.sum() > CONSTANT * k.power)}
        if not kernels:
            return
        place = torch.tensor(list(kernels), device=table.own.device)
        find = _by_tiles if self.alpha == 2 else _by_eigenvalues
        own, pairs = find(list(kernels.values()), orders, self.alpha)
        # Shuffling the one layer is shuffling the other back: both count.
        pairs = (pairs + pairs.mT) / 2
        table.own[index][place] = own
        table.directed[index][place] = torch.stack([kernel.directed.sum() for kernel in kernels.values()]).double()
        table.joint[index][place.unsqueeze(1), place] = pairs[0]
        table.shuffled[index][:, place.unsqueeze(1), place] = pairs[1:]


def _by_tiles(
    kernels: list[KernelRows], orders: list[Tensor], alpha: float
) -> tuple[Float[Tensor, "l"], Float[Tensor, "q l l"]]:
    """Sum squares of the elementwise products over the tiles on and above the diagonal."""
    directed = torch.stack([kernel.directed for kernel in kernels]).double()
    n, count = directed.shape[1], len(kernels)
    size = max(16, min(TILE, BUDGET // (16 * count * n)))
    same = torch.arange(n, device=directed.device)
    own = directed.new_zeros(count)
    pairs = directed.new_zeros(1 + len(orders), count, count)
    for rows in same.split(size):
        columns = same[rows[0] :]
        tile = _squares(kernels, rows, columns)
        pairs[0] += tile @ tile.mT
        own += tile @ _weights(len(rows), len(columns), tile)
        for place, order in enumerate(orders, 1):
            pairs[place] += tile @ _squares(kernels, order[rows], order[columns]).mT
    traces = torch.stack([directed @ directed[:, order].mT for order in (same, *orders)])
    return 2 * directed.sum(1).log() - own.log(), 2 * traces.log() - pairs.log()


def _squares(kernels: list[KernelRows], rows: Tensor, columns: Tensor) -> Float[Tensor, "l m"]:
    tile = torch.stack([kernel.cosines(rows, columns) for kernel in kernels]).square_().flatten(1)
    return tile * _weights(len(rows), len(columns), tile)


def _weights(rows: int, columns: int, like: Tensor) -> Float[Tensor, " m"]:
    """Weigh tiles so that products count twice right of the diagonal block, where the other triangle is left out."""
    weights = like.new_full((rows, columns), 2**0.5)
    weights[:, :rows] = 1
    return weights.flatten()


def _by_eigenvalues(
    kernels: list[KernelRows], orders: list[Tensor], alpha: float
) -> tuple[Float[Tensor, "l"], Float[Tensor, "q l l"]]:
    """Find the spectrum of every product, a pair after the other."""
    count = len(kernels)
    own = kernels[0].diagonal.new_empty(count)
    pairs = own.new_empty(1 + len(orders), count, count)
    for i, left in enumerate(_whole(kernels)):
        own[i] = _entropy(left, alpha)
        for j, right in enumerate(_whole(kernels[: i + 1])):
            pairs[0, i, j] = pairs[0, j, i] = _entropy(left * right, alpha)
            for place, order in enumerate(orders, 1):
                pairs[place, i, j] = _entropy(left * right[order][:, order], alpha)
                pairs[place, j, i] = _entropy(right * left[order][:, order], alpha)
    return own, pairs


def _whole(kernels: list[KernelRows]) -> Iterator[Float[Tensor, "n n"]]:
    for kernel in kernels:
        yield torch.cat([kernel.cosines(part) for part in kernel.parts()])


def _entropy(matrix: Float[Tensor, "n n"], alpha: float) -> Tensor:
    return renyi_entropy(spectral_shares(matrix / matrix.trace()), alpha)
