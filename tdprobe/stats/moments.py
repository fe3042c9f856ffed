"""Means and scatter matrices of every layer, merged by Chan's formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.state import (
    State,
    Statistic,
    by_layer,
    centre,
    check_widths,
    layer_list,
    undisturbed,
    working_dtype,
)
from tdprobe.stats.strips import plus_product
from tdprobe.stats.together import each_layer


class MomentsState(State):
    """Hold count, mean and scatter matrix of each layer.

    Attributes:
        n: Rows seen, int64.
        mu: Layer index (``"0"``, ``"1"``, ...) -> column means ``(*lead, d)`` float64.
        scatters: Layer index -> ``sum (x - mu)(x - mu)'``, ``(*lead, d, d)`` float64.
    """

    n: Tensor
    mu: TensorDict
    scatters: TensorDict

    def merge(self, other: MomentsState) -> MomentsState:
        """Join two streams: scatters add, plus ``n_a n_b / n`` times the outer product of the mean gap."""
        ours, theirs = layer_list(self.mu), layer_list(other.mu)
        check_widths([mu.unsqueeze(-2) for mu in theirs], [tuple(mu.shape) for mu in ours])
        n = self.n + other.n
        share = other.n / n.clamp(min=1).double()

        def joined(mu: Tensor, new: Tensor, scatter: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
            gap = new - mu
            scatter = (scatter + added).addcmul_((self.n * share * gap).unsqueeze(-1), gap.unsqueeze(-2))
            return mu + share * gap, scatter

        scatters = layer_list(self.scatters), layer_list(other.scatters)
        mu, joint = each_layer(joined, lambda mu: 32 * mu.numel() * mu.shape[-1], ours, theirs, *scatters)
        return MomentsState(n=n, mu=by_layer(mu), scatters=by_layer(joint))


@dataclass(frozen=True)
class Moments(Statistic):
    """Keep mean and scatter matrix of every layer: spectra, participation ratio, covariance.

    Products are float64 whatever the rows are: a spectrum has singular values of 1e-4 of the largest, and their
    squares are below what float32 sums resolve.

    Args:
        normalize_rows: Divide each row by its length first; a row of zeros stays.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> Moments().update(Moments().init([x], torch.arange(2)), [x], torch.arange(2)).scatters["0"].item()
        2.0

    References:
        Chan, Golub, LeVeque 1983, Algorithms for computing the sample variance.
    """

    name: ClassVar[str] = "moments"
    normalize_rows: bool = False

    @property
    def route(self) -> str:
        """Say what is kept."""
        return "covariance of unit rows" if self.normalize_rows else "covariance"

    def nbytes(self, widths: Sequence[int], data_sets: int = 1) -> int:
        """Return the size of a state in bytes."""
        return 8 * (1 + data_sets * sum(d + d * d for d in widths))

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> MomentsState:
        """Return zero moments for the layers of ``rows``."""
        working_dtype(rows)
        zeros = [torch.zeros(*x.shape[:-2], x.shape[-1], dtype=torch.float64, device=x.device) for x in rows]
        count = torch.zeros((), dtype=torch.int64, device=rows[0].device)
        return MomentsState(n=count, mu=by_layer(zeros), scatters=by_layer(map(torch.diag_embed, zeros)))

    @undisturbed
    def update(self, state: MomentsState, rows: Sequence[Tensor], ids: Tensor) -> MomentsState:
        """Merge the moments of ``rows`` into the state."""
        check_widths(rows, [tuple(mu.shape) for mu in layer_list(state.mu)])
        working_dtype(rows)
        n = rows[0].shape[-2]
        if n == 0:
            return state
        # Not all layers at a time: centred copies of all of them would be the largest thing in memory.
        kept = layer_list(state.mu), layer_list(state.scatters)
        mu, scatters = each_layer(partial(self._with, before=state.n), _nbytes, rows, *kept)
        return MomentsState(n=state.n + n, mu=by_layer(mu), scatters=by_layer(scatters))

    def _with(self, x: Tensor, mu: Tensor, scatter: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Add the rows of one layer, or of each of some, to the moments of as many rows as came before."""
        x = unit_rows(x) if self.normalize_rows else x
        n, d = x.shape[-2:]
        share = n / (before + n).double()
        y = torch.empty(*x.shape[:-2], n + 1, d, dtype=torch.float64, device=x.device)
        gap = centre(x, torch.float64, out=y[..., :n, :])[1] - mu
        # One more row adds what Chan's formula adds for the gap between the means.
        y[..., n, :] = (before * share).sqrt() * gap
        return mu + share * gap, plus_product(scatter, y, y)


def _nbytes(x: Tensor) -> int:
    """Return what copies of rows take as they are and in float64, with two scatter matrices."""
    return (8 + x.element_size()) * x.numel() + 16 * prod(x.shape[:-2]) * x.shape[-1] ** 2


def unit_rows(x: Float[Tensor, "*lead n d"]) -> Float[Tensor, "*lead n d"]:
    """Divide each row by its length, in float64; a row of zeros stays one.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6, 0.8], [0.0, 0.0]]
    """
    x = x.double()
    # Dividing by the largest entry first keeps squares within range.
    x = x / _nonzero(x.abs().amax(-1, keepdim=True)) if x.shape[-1] else x
    return x / _nonzero(torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)
