"""Gram products: all layer pairs from one centred Gram per layer, never a whole N x N matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.stats.gram_layers import BLOCK, Layers, factors_of
from tdprobe.stats.precision import at_once, summed_dtype
from tdprobe.stats.state import State, Statistic, check_widths, undisturbed, working_dtype
from tdprobe.stats.together import together

# Bytes for the tiles of all layers together.
BUDGET = 64 * 2**20


class GramState(State):
    """Hold sums over updates of the Gram products of all layer pairs.

    Attributes:
        n: Rows seen, int64.
        batches: Updates behind the sums, int64.
        hsic: Sum of the products, ``(*lead, l, l)`` float64.
        spread: Sum of squared distances to the mean of the update, ``(*lead, l)`` float64.
        power: Sum of squared norms before centring, ``(*lead, l)`` float64.
        widths: Width of each layer, ``(l,)`` int64.
    """

    n: Tensor
    batches: Tensor
    hsic: Tensor
    spread: Tensor
    power: Tensor
    widths: Tensor

    def merge(self, other: GramState) -> GramState:
        """Add the sums of two streams over the same layers."""
        if self.widths.tolist() != other.widths.tolist() or self.hsic.shape != other.hsic.shape:
            raise ConfigError(
                f"cannot merge Gram sums of layer widths {self.widths.tolist()} and {other.widths.tolist()}; "
                "both must come from the same layers and leading dimensions"
            )
        return self._plus((other.hsic, other.spread, other.power), other.n, other.batches)

    def _plus(self, sums: tuple[Tensor, Tensor, Tensor], n: Tensor | int, batches: Tensor | int) -> GramState:
        hsic, spread, power = sums
        return GramState(
            n=self.n + n,
            batches=self.batches + batches,
            hsic=self.hsic + hsic,
            spread=self.spread + spread,
            power=self.power + power,
            widths=self.widths,
        )


@dataclass(frozen=True)
class Gram(Statistic):
    """Sum Gram products over updates: minibatch CKA with an L x L state.

    Each update centres its own rows, so a stream of several updates estimates the average dependence *within*
    batches; a single update with all rows is exact.

    Args:
        unbiased: Add n times HSIC_1 of each update (n >= 4); otherwise ``<K_i, K_j>`` of the centred Grams.
        whole: Say that all rows come in one update, so that tables tell the exact value from that of minibatches.

    Example:
        >>> x = torch.randn(64, 8)
        >>> state = Gram().update(Gram().init([x, 2 * x], torch.arange(64)), [x, 2 * x], torch.arange(64))
        >>> bool(torch.isclose(state.hsic[0, 1], 4 * state.hsic[0, 0]))
        True

    References:
        Song et al. 2012, Feature selection via dependence maximization, eq. 5.
        Nguyen, Raghu, Kornblith 2021, Do wide and deep networks learn the same things?, eq. 3.
    """

    name: ClassVar[str] = "gram"
    unbiased: bool = True
    whole: bool = False

    @property
    def route(self) -> str:
        """Say which rows meet."""
        return "Grams of all rows" if self.whole else "minibatch Grams"

    def work(self, widths: Sequence[int], n: int) -> float:
        """Count the products of one update: half of the Gram of each layer, and all pairs of these."""
        return n * n * (sum(widths) + len(widths) ** 2) / 2

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> GramState:
        """Return zero sums for the layers of ``rows``."""
        working_dtype(rows)
        lead, layers = rows[0].shape[:-2], len(rows)
        zeros = torch.zeros(*lead, layers, dtype=torch.float64, device=rows[0].device)
        count = torch.zeros((), dtype=torch.int64, device=rows[0].device)
        hsic = torch.zeros(*lead, layers, layers, dtype=torch.float64, device=rows[0].device)
        widths = torch.tensor([x.shape[-1] for x in rows], device="cpu")
        return GramState(n=count, batches=count, hsic=hsic, spread=zeros, power=zeros, widths=widths)

    @undisturbed
    def update(self, state: GramState, rows: Sequence[Tensor], ids: Tensor) -> GramState:
        """Add the products of one update; an update without rows adds nothing.

        Raises:
            ConfigError: 1 to 3 rows with ``unbiased=True``, or layers other than those of ``init``.
        """
        lead = state.spread.shape[:-1]
        check_widths(rows, [(*lead, width) for width in state.widths.tolist()])
        n = rows[0].shape[-2]
        if n == 0:
            return state
        hsic, spread, power = (torch.zeros_like(part) for part in (state.hsic, state.spread, state.power))
        for index in product(*map(range, lead)):
            hsic[index], spread[index], power[index] = _products([x[index] for x in rows], self.unbiased)
        if self.unbiased:
            # HSIC_1 is a mean over rows: unweighted, the short last batch of a stream would count like a full one.
            hsic *= n
        return state._plus((hsic, spread, power), n, 1)


def gram_products(rows: Sequence[Tensor], unbiased: bool = True) -> Float[Tensor, "l l"]:
    """Compute the Gram product of every pair of layers.

    With centred rows, ``K_i = X_i X_i'`` and ``k_i`` its diagonal: ``<K_i, K_j>``, or, unbiased (HSIC_1),
    ``[<K_i, K_j> - k_i.k_j + (sum k_i)(sum k_j) / ((n-1)(n-2)) - 2 k_i.k_j / (n-2)] / (n (n-3))``:
    centring makes the row sums of the Gram zero, so every correction comes from the diagonals.

    Args:
        rows: One tensor per layer, ``(n, d_layer)``; widths may differ, views are fine.
        unbiased: HSIC_1 instead of the plain product.

    Returns:
        The products, symmetric, ``(l, l)`` float64.

    Raises:
        ConfigError: Fewer than 4 rows with ``unbiased=True``.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> gram_products([x, -x], unbiased=False).round()
        tensor([[4., 4.],
                [4., 4.]], dtype=torch.float64)
    """
    return _products(rows, unbiased)[0]


def _products(rows: Sequence[Tensor], unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = rows[0].shape[0], summed_dtype(rows)
    if unbiased and n < 4:
        raise ConfigError(
            f"got {n} rows; unbiased CKA compares at least 4 at a time: give more or longer texts, or larger batches"
        )
    # Rows as they are, and those of two sides of a tile twice.
    groups = together(rows, lambda x: x.numel() * (x.element_size() + 4 * dtype.itemsize))
    layers = [Layers([rows[place] for place in group], dtype) for group in groups]
    spread, power = (torch.cat([getattr(some, name).reshape(-1) for some in layers]) for name in ("spread", "power"))
    # Squares of Gram entries leave float32 long before entries do, so Grams are scaled to a unit diagonal.
    scale = torch.where(spread > 0, n / spread, 1.0).clamp(max=1e37)
    off, k = _tiled(layers, scale, dtype)
    kl = k @ k.mT
    if unbiased:
        total = k.sum(1)
        off = off + torch.outer(total, total) / ((n - 1) * (n - 2)) - 2 * kl / (n - 2)
        products = off / (n * (n - 3))
    else:
        products = off + kl
    products /= torch.outer(scale, scale)
    # From the order of the groups into that of the rows.
    order = [place for group in groups for place in group]
    if order == sorted(order):
        return products, spread, power
    places = torch.tensor(order, device="cpu").argsort().to(products.device)
    return products[places][:, places], spread[places], power[places]


def _tiled(
    layers: Sequence[Layers], scale: Float[Tensor, " l"], dtype: torch.dtype
) -> tuple[Float[Tensor, "l l"], Float[Tensor, "l n"]]:
    """Walk the upper triangle of tiles: off-diagonal products of the scaled Grams, and their diagonals."""
    count, n, device = len(scale), layers[0].rows[0].shape[0], scale.device
    width = max(some.rows[0].shape[1] for some in layers)
    block, budget = min(at_once(BLOCK, device), n), at_once(BUDGET, device)
    columns = min(n, max(block, budget // (count * block * dtype.itemsize)))
    store = torch.empty(count * block * columns, dtype=dtype, device=device)
    memory = [torch.empty(size, width, dtype=dtype, device=device) for size in (block, columns)]
    total = torch.zeros(count, count, dtype=torch.float64, device=device)
    diagonal = torch.empty(count, n, dtype=torch.float64, device=device)
    sizes = [len(some.rows) for some in layers]
    factors = factors_of(scale.split(sizes), dtype)
    for i in range(0, n, block):
        high = min(i + block, n)
        for j in range(i, n, columns):
            wide = min(j + columns, n)
            tile = store[: count * (high - i) * (wide - j)].view(count, high - i, wide - j)
            for some, factor, out in zip(layers, factors, tile.split(sizes), strict=True):
                some.gram(slice(i, high), slice(j, wide), factor, memory, out)
            if i == j:
                diagonal[:, i:high] = _halve_square(tile[:, :, : high - i])
            flat = tile.flatten(1)
            total += flat @ flat.mT
    return 2 * total, diagonal


def _halve_square(square: Float[Tensor, "l b b"]) -> Float[Tensor, "l b"]:
    """Take the diagonal out of the square tile, which holds both triangles while all other tiles hold one."""
    diagonal = square.diagonal(dim1=1, dim2=2)
    taken = diagonal.clone()
    diagonal.zero_()
    square *= 0.5**0.5
    return taken
