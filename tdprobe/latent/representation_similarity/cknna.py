"""Kernel alignment over nearest neighbours."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import PairEstimator
from tdprobe.registry import Mode, Spec, check_mode, register
from tdprobe.stats.jackknife import jackknife_se
from tdprobe.stats.kernel_layer import Rows
from tdprobe.stats.kernel_neighbors import KernelNeighbors
from tdprobe.stats.kernels import BLOCK, BUDGET, EPS, GROUPS
from tdprobe.stats.precision import at_once, product_dtype
from tdprobe.stats.reservoir import Reservoir, ReservoirState
from tdprobe.stats.state import Statistic, all_finite, layer_list
from tdprobe.stream.batch import Batch


@register(
    Spec(
        name="cknna",
        kind="pair",
        symmetric=True,
        bounds=(-1.0, 1.0),
        larger_means="more similar among neighbours",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="2 n^2 d per layer and n^2 per pair, for a bank of n rows",
        reference="Huh, Cheung, Wang, Isola 2024, The platonic representation hypothesis",
    )
)
class CknnaEstimator(PairEstimator):
    """Align the kernels of two representations where samples are neighbours in both.

    ``Align(K, L) / sqrt(Align(K, K) Align(L, L))`` with ``Align(K, L) = sum_ij alpha_ij K_ij L_ij``, where
    ``alpha_ij`` is 1 if j is among the k nearest neighbours of i, i itself left out, in both representations, else
    0, and ``K_ij`` the inner product of rows with centred columns: that makes the means ``E_l K_il`` zero, which the
    paper takes off. With ``k = n - 1`` it is linear CKA without the diagonal.

    Neighbours are nearest in Euclidean distance; scale rows to length one first for the cosine of the paper. All
    rows as near as the k-th neighbour count, so the order of rows never matters. A layer without variance scores
    NaN, as does one with NaN.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k: Neighbours of each row.
        mode: Changes nothing here: ``"strict"`` and ``"robust"`` agree.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, a ``k`` that is no integer from 1 on, or an unknown mode.

    Example:
        >>> x = torch.randn(100, 8)
        >>> CknnaEstimator()(TensorDict({"data_a": x, "data_b": 2 * x + 1}))["cknna"].round(decimals=4)
        tensor(1.)

    References:
        Huh, Cheung, Wang, Isola 2024, The platonic representation hypothesis, appendix A.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "cknna",
        k: int = 10,
        *,
        mode: Mode = "strict",
        bank_size: int = 4096,
    ) -> None:
        super().__init__([in_key_a, in_key_b], [out_key])
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"got k={k!r}; allowed are integers from 1 on")
        self.in_key_a, self.in_key_b, self.out_key = in_key_a, in_key_b, out_key
        self.k, self.mode, self.bank_size = k, check_mode(mode), bank_size

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def score(self, state: ReservoirState) -> TensorDict:
        """Align all layer pairs.

        Args:
            state: The bank.

        Returns:
            ``"score"`` and its standard error ``"se"``, ``(*lead, l, l)`` float64; ``"finite"``. The error is
            that of leaving out one eighth of the rows at a time, as samples and as neighbours.

        Raises:
            ConfigError: Fewer than k + 1 rows.
        """
        n, rows = int(state.n), layer_list(state.rows)
        if n <= self.k:
            raise ConfigError(f"got {n} rows; cknna with k={self.k} needs at least k+1 = {self.k + 1}")
        lead, device, groups = rows[0].shape[:-2], rows[0].device, min(GROUPS, n)
        # The caller's autograd, autocast and inference mode are the model's.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            finite = torch.stack([all_finite(x).to(device) for x in rows], -1)
            shape = (groups, groups, *lead, len(rows), len(rows))
            products = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
            for index in product(*map(range, lead)):
                layers = {i: x[index].detach() for i, x in enumerate(rows) if bool(finite[(*index, i)])}
                spaces = {i: Rows(x, "plain", product_dtype(rows), device) for i, x in layers.items()}
                held = [i for i, space in spaces.items() if space.spread > EPS * space.power]
                if held:
                    at = torch.tensor(held, device=device)
                    target = products[(slice(None), slice(None), *index)]
                    near = [KernelNeighbors(layers[i].to(device), spaces[i], self.k) for i in held]
                    target[:, :, at.unsqueeze(1), at] = _products(near, groups)
        total = products.sum((0, 1))
        left_out = products.sum(0) + products.sum(1) - products.diagonal(dim1=0, dim2=1).movedim(-1, 0)
        sizes = torch.tensor([float(len(part)) for part in torch.arange(n).tensor_split(groups)], device=device)
        se = jackknife_se(_cosine(total), _cosine(total - left_out), sizes)
        return TensorDict({"score": _cosine(total), "se": se, "finite": finite})


def _cosine(products: Float[Tensor, "*s l l"]) -> Float[Tensor, "*s l l"]:
    own = products.diagonal(dim1=-2, dim2=-1)
    own = torch.where(own > 0, own, torch.nan).sqrt()
    return products / (own.unsqueeze(-1) * own.unsqueeze(-2))


def _products(layers: list[KernelNeighbors], groups: int) -> Float[Tensor, "g g l l"]:
    """Sum the products of kernels that are zero except at neighbours, by the groups of rows and of neighbours."""
    n, points = len(layers[0].given), layers[0].points.points
    size, budget = at_once(BLOCK, points.device), at_once(BUDGET, points.device)
    size = max(16, min(size, budget // (len(layers) * n * points.dtype.itemsize)))
    store = points.new_empty(len(layers), size, n)
    gram, square = points.new_empty(2, size, n)
    total = torch.zeros(groups, groups, len(layers), len(layers), dtype=torch.float64, device=points.device)
    parts = torch.arange(n, device=points.device).tensor_split(groups)
    for group, members in enumerate(parts):
        for rows in members.split(size):
            left, tile = slice(int(rows[0]), int(rows[-1]) + 1), store[:, : len(rows)]
            for layer, out in zip(layers, tile, strict=True):
                space = layer.points
                inner = torch.mm(space.points[left], space.points.mT, out=gram[: len(rows)])
                squared = space.square(inner, left, slice(None), square[: len(rows)])
                layer.keep(rows, inner, squared, out.zero_())
            columns = (part.flatten(1) for part in tile.tensor_split(groups, dim=2))
            total[group] += torch.stack([flat @ flat.mT for flat in columns])
    return total
