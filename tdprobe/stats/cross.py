"""Cross products of every pair of layers: exact linear CKA, biased or unbiased, from a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.stats.cross_state import CrossState, pairs
from tdprobe.stats.precision import summed_dtype
from tdprobe.stats.sketch import sketch_map
from tdprobe.stats.state import Statistic, by_layer, centre, check_widths, layer_list, undisturbed, working_dtype
from tdprobe.stats.strips import plus_product
from tdprobe.stats.together import apart, stacked, together

# Rows that are centred at a time: few enough to stay in cache, enough to make a product worth its sum.
TILE = 2048
# Columns of a sketch that is taken because the exact products would be too large.
SKETCH = 256


@dataclass(frozen=True)
class Cross(Statistic):
    """Keep what exact linear CKA of every layer pair needs, whatever the batches were.

    The sums are central moments (second order; up to fourth for the unbiased product), so nothing cancels at
    any offset and a merge is exact: the Gram matrices of HSIC_1 enter only through ``|C_ij|^2``, ``sum k_i``
    and ``sum k_i k_j``, with ``k`` the squared norms of centred rows.

    Time and memory go with the square of the columns, hence a sketch. The Frobenius products behind CKA stay right on
    average (`CrossState.hsic`): between layers of SmolLM2 (width 576, sketch=256) CKA scatters by 0.015. What a sketch
    does to other measures is systematic; their descriptions say how much.

    Args:
        unbiased: Keep the third and fourth order sums of HSIC_1 as well.
        sketch: Map every wider layer onto this many columns first, each by a random map of its own (`sketch_map`).
        seed: Seed of the maps.

    Raises:
        ConfigError: A sketch of less than one column.

    Example:
        >>> Cross().nbytes([2, 3])  # 2 + 3 means, 4 + 6 + 9 products, 2 widths and 4 more, 8 bytes each
        240

    References:
        Song et al. 2012, Feature selection via dependence maximization, eq. 5.
        Chan, Golub, LeVeque 1983, Algorithms for computing the sample variance.
    """

    name: ClassVar[str] = "cross"
    unbiased: bool = False
    sketch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sketch."""
        wrong = isinstance(self.sketch, bool) or not isinstance(self.sketch, int) or self.sketch < 1
        if self.sketch is not None and wrong:
            raise ConfigError(f"got sketch={self.sketch!r}; allowed are None and numbers of columns from 1 on")

    @property
    def route(self) -> str:
        """Say what is kept."""
        return "cross-covariances" + (f", sketched to {self.sketch} columns" if self.sketch else "")

    def work(self, widths: Sequence[int], n: int) -> float:
        """Count the products of all pairs of columns of two layers, or of one."""
        columns = [self._columns(width) for width in widths]
        return n * (sum(columns) ** 2 + sum(k * k for k in columns)) / 2

    def covers(self, other: Statistic) -> bool:
        """Tell that the sums behind the unbiased product come on top of those that all measures read."""
        return isinstance(other, Cross) and self in (other, replace(other, unbiased=True))

    def cheaper(self) -> Cross | None:
        """Return the same with a sketch."""
        return replace(self, sketch=SKETCH) if self.sketch is None else None

    def _columns(self, width: int) -> int:
        return min(width, self.sketch or width)

    def nbytes(self, widths: Sequence[int], data_sets: int = 1) -> int:
        """Return the size of a state in bytes, so that a caller can refuse before allocating it.

        Args:
            widths: Width of each layer.
            data_sets: Product of the leading dimensions.
        """
        columns, layers = [self._columns(width) for width in widths], len(widths)
        numbers = sum(columns) + (sum(columns) ** 2 + sum(k * k for k in columns)) // 2
        numbers += (sum(columns) * layers + layers**2) * self.unbiased
        return 8 * (4 + layers + data_sets * numbers)

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> CrossState:
        """Return zero sums for the layers of ``rows``."""
        working_dtype(rows)
        lead, device, layers = rows[0].shape[:-2], rows[0].device, len(rows)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*lead, *shape, dtype=torch.float64, device=device)

        columns = [self._columns(x.shape[-1]) for x in rows]
        kept = layers if self.unbiased else 0
        return CrossState(
            n=torch.zeros((), dtype=torch.int64, device=device),
            mu=by_layer(map(zeros, columns)),
            cross=TensorDict({key: zeros(columns[i], columns[j]) for i, j, key in pairs(layers)}),
            cubic=by_layer(zeros(k, layers) for k in columns[:kept]),
            quartic=zeros(kept, kept),
            widths=torch.tensor([x.shape[-1] for x in rows], device="cpu"),
            sketch=torch.tensor([self.sketch or 0, self.seed if self.sketch else 0], device="cpu"),
            precision=torch.zeros((), dtype=torch.float64, device="cpu"),
        )

    @undisturbed
    def update(self, state: CrossState, rows: Sequence[Tensor], ids: Tensor) -> CrossState:
        """Merge the sums of ``rows`` into the state."""
        lead = state.mu["0"].shape[:-1]
        check_widths(rows, [(*lead, width) for width in state.widths.tolist()])
        n = rows[0].shape[-2]
        if n == 0:
            return state
        dtype = summed_dtype(rows)
        precision = state.precision.clamp(min=torch.finfo(dtype).eps)
        # What one stream keeps for several estimators may be more than one of them asks for.
        if self.unbiased or state.unbiased:
            return state.merge(self._batch(state, rows, torch.full_like(state.n, n), precision, dtype))
        mu, seen = layer_list(state.mu), state.n
        cross, groups = state.cross, self._groups(rows, dtype)
        buffers = _empty(rows, groups, dtype, state.columns, min(n, TILE) + 1)
        for start in range(0, n, TILE):
            tile = [x[..., start : start + TILE, :] for x in rows]
            parts = [x[..., : tile[0].shape[-2] + 1, :] for x in buffers]
            mu = self._beside_gap(tile, groups, parts, seen, mu)
            seen = seen + tile[0].shape[-2]
            # What was given keeps its value; what was made here needs no copy.
            cross = _added(cross, groups, parts, into_new=start == 0)
        return state.replaced(n=seen, mu=by_layer(mu), cross=TensorDict(cross), precision=precision)

    def _groups(self, rows: Sequence[Tensor], dtype: torch.dtype) -> list[list[int]]:
        """Say which layers go together; each sketch has a map of its own."""
        widest = max(self._columns(x.shape[-1]) for x in rows)

        def nbytes(x: Tensor) -> float:
            products = (8 + dtype.itemsize) * prod(x.shape[:-2]) * x.shape[-1] * widest
            return x.numel() * x.element_size() + products if self._columns(x.shape[-1]) == x.shape[-1] else inf

        return together(rows, nbytes)

    def _beside_gap(
        self,
        rows: Sequence[Tensor],
        groups: Sequence[list[int]],
        parts: Sequence[Tensor],
        seen: Tensor,
        old: Sequence[Tensor],
    ) -> list[Tensor]:
        """Write to ``parts`` what ``seen`` rows of means ``old`` gain by more; return the means of all.

        The gap of the means enters the merged products like one more row.
        """
        n, mu = rows[0].shape[-2], list(old)
        share = n / (seen + n).double()
        weight = (seen * share).sqrt()
        for group, part in zip(groups, parts, strict=True):
            means = stacked(old, group)
            gap = self._centre(rows, group, part[..., :n, :]) - means
            part[..., n, :] = gap * weight
            for place, mean in zip(group, apart(means + share * gap, group), strict=True):
                mu[place] = mean
        return mu

    def _batch(
        self, state: CrossState, rows: Sequence[Tensor], n: Tensor, precision: Tensor, dtype: torch.dtype
    ) -> CrossState:
        """Return the state of one update, with the sums behind the unbiased product."""
        groups = self._groups(rows, dtype)
        stacks = _empty(rows, groups, dtype, state.columns, rows[0].shape[-2])
        means = [self._centre(rows, group, stack) for group, stack in zip(groups, stacks, strict=True)]
        mu, parts = _by_place(groups, means), _by_place(groups, stacks)
        nothing = torch.zeros((), dtype=torch.float64, device=rows[0].device)
        zeros = {key: nothing.expand_as(state.cross[key]) for _, _, key in pairs(len(rows))}
        k = torch.stack([torch.linalg.vector_norm(y, dim=-1).square() for y in parts], -1)
        return state.replaced(
            n=n,
            mu=by_layer(mu),
            cross=TensorDict(_added(zeros, groups, stacks, into_new=True)),
            cubic=by_layer((y.mT @ k).double() for y in parts),
            quartic=k.double().mT @ k.double(),
            precision=precision,
        )

    def _centre(self, rows: Sequence[Tensor], group: list[int], part: Tensor) -> Tensor:
        """Write the centred rows of a group of layers to ``part``, and return their means."""
        x, kept = stacked(rows, group), part.shape[-1]
        if kept == x.shape[-1]:
            return centre(x, part.dtype, part)[1]
        y, means = centre(x, part.dtype)
        w = sketch_map(x.shape[-1], kept, self.seed, group[0]).to(x.device)
        part.copy_(y @ w.to(part.dtype))
        return means @ w.double()


def _empty(
    rows: Sequence[Tensor], groups: Sequence[list[int]], dtype: torch.dtype, columns: Sequence[int], n: int
) -> list[Tensor]:
    """Return room for n rows of each layer, by group."""
    shapes = [(*[len(group)] * (len(group) > 1), *rows[group[0]].shape[:-2], n, columns[group[0]]) for group in groups]
    return [rows[group[0]].new_empty(shape, dtype=dtype) for group, shape in zip(groups, shapes, strict=True)]


def _by_place(groups: Sequence[list[int]], stacks: Sequence[Tensor]) -> list[Tensor]:
    """Return what belongs to each layer, in their order."""
    both = zip(groups, stacks, strict=True)
    layers = {place: x for group, stack in both for place, x in zip(group, apart(stack, group), strict=True)}
    return [layers[place] for place in range(len(layers))]


def _added(
    cross: Mapping[str, Tensor] | TensorDict, groups: Sequence[list[int]], stacks: Sequence[Tensor], *, into_new: bool
) -> dict[str, Tensor]:
    """Add the products of all pairs to their sums, in place or into new tensors; those with a group in one step."""
    found, parts = {}, _by_place(groups, stacks)
    for i, x in enumerate(parts):
        for group, stack in zip(groups, stacks, strict=True):
            if group[-1] < i:
                continue
            keys = [f"{i}-{j}" for j in group if j >= i]
            if len(keys) == 1:
                old = cross[keys[0]]
                found[keys[0]] = plus_product(old, x, parts[group[-1]], out=None if into_new else old)
            else:
                old, y = torch.stack([cross[key] for key in keys]), stack[-len(keys) :]
                found |= zip(keys, plus_product(old, x.expand(len(y), *x.shape), y, out=old).unbind(), strict=True)
    return {key: found[key] for _, _, key in pairs(len(parts))}
