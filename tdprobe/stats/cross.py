"""Cross products of every pair of layers: exact linear CKA, biased or unbiased, from a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        cross = state.cross
        buffers = _empty(rows, dtype, state.columns, min(n, TILE) + 1)
        for start in range(0, n, TILE):
            tile = [x[..., start : start + TILE, :] for x in rows]
            parts = [x[..., : tile[0].shape[-2] + 1, :] for x in buffers]
            seen, mu = self._beside_gap(tile, parts, seen, mu)
            # What was given keeps its value; what was made here needs no copy.
            cross = _added(cross, parts, into_new=start == 0)
        return state.replaced(n=seen, mu=by_layer(mu), cross=TensorDict(cross), precision=precision)

    def _beside_gap(
        self, rows: Sequence[Tensor], parts: Sequence[Tensor], seen: Tensor, old: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Write to ``parts`` what ``seen`` rows of means ``old`` gain by more; return the number and means of all.

        The gap of the means enters the merged products like one more row.
        """
        n = rows[0].shape[-2]
        share = n / (seen + n).double()
        new = self._centre(rows, [part[..., :n, :] for part in parts])
        gaps = [b - a for a, b in zip(old, new, strict=True)]
        for part, gap in zip(parts, gaps, strict=True):
            part[..., n, :] = gap * (seen * share).sqrt()
        return seen + n, [a + share * gap for a, gap in zip(old, gaps, strict=True)]

    def _batch(
        self, state: CrossState, rows: Sequence[Tensor], n: Tensor, precision: Tensor, dtype: torch.dtype
    ) -> CrossState:
        """Return the state of one update, with the sums behind the unbiased product."""
        parts = _empty(rows, dtype, state.columns, rows[0].shape[-2])
        mu = self._centre(rows, parts)
        nothing = torch.zeros((), dtype=torch.float64, device=rows[0].device)
        zeros = {key: nothing.expand_as(state.cross[key]) for _, _, key in pairs(len(rows))}
        k = torch.stack([torch.linalg.vector_norm(y, dim=-1).square() for y in parts], -1)
        return state.replaced(
            n=n,
            mu=by_layer(mu),
            cross=TensorDict(_added(zeros, parts, into_new=True)),
            cubic=by_layer((y.mT @ k).double() for y in parts),
            quartic=k.double().mT @ k.double(),
            precision=precision,
        )

    def _centre(self, rows: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """Write the centred rows of each layer to ``parts``, and return their means."""
        mu = []
        for layer, (x, part) in enumerate(zip(rows, parts, strict=True)):
            width, kept = x.shape[-1], part.shape[-1]
            if kept == width:
                means = centre(x, part.dtype, part)[1]
            else:
                y, means = centre(x, part.dtype)
                w = sketch_map(width, kept, self.seed, layer).to(x.device)
                torch.matmul(y, w.to(part.dtype), out=part)
                means = means @ w.double()
            mu.append(means)
        return mu


def _empty(rows: Sequence[Tensor], dtype: torch.dtype, columns: Sequence[int], n: int) -> list[Tensor]:
    """Return room for n rows of each layer."""
    return [x.new_empty((*x.shape[:-2], n, kept), dtype=dtype) for x, kept in zip(rows, columns, strict=True)]


def _added(cross: Mapping[str, Tensor] | TensorDict, parts: Sequence[Tensor], *, into_new: bool) -> dict[str, Tensor]:
    """Add the products of all pairs to their sums, in place or into new tensors."""
    return {
        key: plus_product(cross[key], parts[i], parts[j], out=None if into_new else cross[key])
        for i, j, key in pairs(len(parts))
    }
