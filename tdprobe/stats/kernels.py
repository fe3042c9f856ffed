"""Kernels over a bank of rows, for all layers at once: blocks come and go, sums stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.stats.kernel_layer import Fitted, Kernel, Rows
from tdprobe.stats.pair_sums import PairSums
from tdprobe.stats.precision import product_dtype
from tdprobe.stats.reservoir import ReservoirState
from tdprobe.stats.state import Derivation, all_finite, layer_list

# Rows of a tile, and bytes for the tiles of all layers and kernels together.
BLOCK, BUDGET = 128, 64 * 2**20
# Groups of rows for standard errors.
GROUPS = 8
# Variance relative to the mean square that counts as none.
EPS = 1e-12


@dataclass(frozen=True)
class KernelTable:
    """Hold what `Kernels` summed.

    Attributes:
        n: Rows, int64.
        sums: By kernel.
        finite: Whether a layer holds finite numbers only, ``(*lead, l)`` bool.
    """

    n: Tensor
    sums: dict[Kernel, PairSums]
    finite: Tensor

    def scored(self, kernel: Kernel, score: Callable[[PairSums], Tensor], eps: float = EPS) -> TensorDict:
        """Return ``"score"``, ``"se"`` and ``"finite"``.

        Args:
            kernel: One of the table.
            score: A method of `PairSums`.
            eps: Variance relative to the mean square up to which a layer scores NaN.
        """
        sums = self.sums[kernel]
        fine = torch.where(sums.spread > eps * sums.power, 1.0, torch.nan)
        both = fine.unsqueeze(-1) * fine.unsqueeze(-2)
        return TensorDict({"score": both * score(sums), "se": both * sums.se(score), "finite": self.finite})


@dataclass(frozen=True)
class Kernels(Derivation):
    """Say which kernels to sum over the pairs of rows of a bank.

    Every layer has one product per tile, from which all kernels of a view are made in place; the products of all
    pairs of layers are one product more, and the tile is dropped. Only tiles above the diagonal are made. Beside the
    sums it takes memory for a centred copy of the bank and `BUDGET`, never for n x n numbers.

    Args:
        kernels: Each once.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> kernel = Kernel("distance")
        >>> table = Kernels((kernel,)).of_rows([x, -2 * x])
        >>> table.sums[kernel].correlation().allclose(torch.ones(2, 2, dtype=torch.float64))
        True
    """

    kernels: tuple[Kernel, ...]

    def joined(self, other: Any) -> Kernels | None:
        """Return what sums the kernels of both."""
        if not isinstance(other, Kernels):
            return None
        return Kernels(tuple(dict.fromkeys((*self.kernels, *other.kernels))))

    def __call__(self, state: ReservoirState) -> KernelTable:
        """Sum over the rows of a bank."""
        return self.of_rows(layer_list(state.rows))

    def of_rows(self, rows: Sequence[Tensor]) -> KernelTable:
        """Sum over rows at hand.

        Args:
            rows: One tensor per layer, ``(*lead, n, d_layer)``.
        """
        dtype, n, lead, device = product_dtype(rows), rows[0].shape[-2], rows[0].shape[:-2], rows[0].device
        # The caller's autograd, autocast and inference mode are the model's.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            finite = torch.stack([all_finite(x).to(device) for x in rows], -1)
            sums = {kernel: _empty(lead, len(rows), n, dtype, device) for kernel in self.kernels}
            for index in product(*map(range, lead)):
                layers = {i: x[index].detach() for i, x in enumerate(rows) if bool(finite[(*index, i)])}
                for view in dict.fromkeys(kernel.view for kernel in self.kernels):
                    spaces = {i: Rows(x, view, dtype, device) for i, x in layers.items()}
                    _fill({k: sums[k] for k in self.kernels if k.view == view}, index, spaces)
        return KernelTable(torch.tensor(n, device="cpu"), sums, finite)


def as_kernels(state: ReservoirState | KernelTable, wanted: Kernels) -> KernelTable:
    """Return a table as it is, and work it out from a bank."""
    return state if isinstance(state, KernelTable) else wanted(state)


def _empty(lead: tuple[int, ...], layers: int, n: int, dtype: torch.dtype, device: torch.device) -> PairSums:
    groups = max(1, min(GROUPS, n))
    sizes = torch.tensor([len(part) for part in torch.arange(n, device="cpu").tensor_split(groups)], device="cpu")

    def full(*shape: int) -> Tensor:
        return torch.full((*lead, *shape), torch.nan, dtype=torch.float64, device=device)

    return PairSums(
        products=full(groups, groups, layers, layers),
        sums=full(groups, layers, n),
        shift=full(layers, n),
        diagonal=full(layers, n),
        spread=full(layers),
        power=full(layers),
        group=torch.arange(groups, device="cpu").repeat_interleave(sizes).to(device),
        noise=(8 * torch.finfo(dtype).eps) ** 2,
    )


def _fill(sums: dict[Kernel, PairSums], index: tuple[int, ...], spaces: dict[int, Rows]) -> None:
    """Write the sums over one data set."""
    some = next(iter(sums.values()))
    held = torch.tensor([i for i, space in spaces.items() if space.spread > 0], dtype=torch.int64, device="cpu")
    for i, space in spaces.items():
        for found in sums.values():
            found.spread[(*index, i)], found.power[(*index, i)] = space.spread, space.power
    if len(held) == 0:
        return
    used = [spaces[i] for i in held.tolist()]
    fitted = [[Fitted(kernel, space) for space in used] for kernel in sums]
    products, totals = _walk(used, fitted, torch.bincount(some.group).tolist())
    held = held.to(some.group.device)
    for place, (found, kernels) in enumerate(zip(sums.values(), fitted, strict=True)):
        found.products[index][..., held.unsqueeze(1), held] = products[place]
        found.sums[index][..., held, :] = totals[place]
        found.shift[index][held] = torch.stack([kernel.shift.double() for kernel in kernels])
        found.diagonal[index][held] = torch.stack([kernel.diagonal for kernel in kernels])


def _walk(spaces: list[Rows], fitted: list[list[Fitted]], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Sum the values of some kernels over the tiles above the diagonal: ``(k, g, g, l, l)`` and ``(k, g, l, n)``."""
    kernels, layers, points = len(fitted), len(spaces), spaces[0].points
    width = max(BLOCK, BUDGET // (kernels * layers * BLOCK * points.dtype.itemsize))
    area = BLOCK * min(width, max(sizes))
    # Fresh memory for every tile would cost as much as the products in it.
    store, gram, square = (points.new_empty(count * area) for count in (kernels * layers, 1, 1))
    products = torch.zeros(kernels, len(sizes), len(sizes), layers, layers, dtype=torch.float64, device=points.device)
    totals = torch.zeros(kernels, len(sizes), layers, len(points), dtype=torch.float64, device=points.device)
    for g, h, left, right in _tiles(sizes, width):
        shape = left.stop - left.start, right.stop - right.start
        tile, *memory = (x[: c * shape[0] * shape[1]] for x, c in ((store, kernels * layers), (gram, 1), (square, 1)))
        tile = tile.view(kernels, layers, *shape)
        for place, space in enumerate(spaces):
            inner = torch.mm(space.points[left], space.points[right].mT, out=memory[0].view(shape))
            squared = space.square(inner, left, right, memory[1].view(shape))
            for kernel, out in zip(fitted, tile[:, place], strict=True):
                kernel[place].fill(out, inner, squared, left, right)
        if left == right:
            tile.diagonal(dim1=-2, dim2=-1).zero_()
        flat = tile.flatten(2)
        # A tile on the diagonal holds every pair twice, like the sum of a tile above it and its mirror image.
        products[:, g, h] += (flat @ flat.mT) * (0.5 if left == right else 1.0)
        totals[:, h, :, left] += tile.sum(3)
        if left != right:
            totals[:, g, :, right] += tile.sum(2)
    return products + products.transpose(1, 2), totals


def _tiles(sizes: list[int], width: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Cut the upper triangle of all pairs of rows, with squares on the diagonal.

    Yields:
        Group of the rows, group of the columns (not lower), rows, columns.
    """
    edges = [sum(sizes[:g]) for g in range(len(sizes) + 1)]
    groups = range(len(sizes))
    starts = [(group, start) for group in groups for start in range(edges[group], edges[group + 1], BLOCK)]
    for g, start in starts:
        left = slice(start, min(start + BLOCK, edges[g + 1]))
        yield g, g, left, left
        firsts = ((h, first) for h in groups[g:] for first in range(max(left.stop, edges[h]), edges[h + 1], width))
        yield from ((g, h, left, slice(first, min(first + width, edges[h + 1]))) for h, first in firsts)
