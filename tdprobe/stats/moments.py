"""Means and scatter matrices of every layer, merged by Chan's formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

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
        gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
        scatters = []
        for a, b, gap in zip(layer_list(self.scatters), layer_list(other.scatters), gaps, strict=True):
            scatters.append((a + b).addcmul_((self.n * share * gap).unsqueeze(-1), gap.unsqueeze(-2)))
        mu = by_layer(a + share * gap for a, gap in zip(ours, gaps, strict=True))
        return MomentsState(n=n, mu=mu, scatters=by_layer(scatters))


@dataclass(frozen=True)
class Moments(Statistic):
    """Keep mean and scatter matrix of every layer: spectra, participation ratio, covariance.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> Moments().update(Moments().init([x], torch.arange(2)), [x], torch.arange(2)).scatters["0"].item()
        2.0

    References:
        Chan, Golub, LeVeque 1983, Algorithms for computing the sample variance.
    """

    name: ClassVar[str] = "moments"

    @property
    def route(self) -> str:
        """Say what is kept."""
        return "covariance"

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
        n, dtype = rows[0].shape[-2], working_dtype(rows)
        if n == 0:
            return state
        centred, mu = zip(*(centre(x, dtype) for x in rows), strict=True)
        scatters = by_layer((y.mT @ y).double() for y in centred)
        return state.merge(MomentsState(n=torch.full_like(state.n, n), mu=by_layer(mu), scatters=scatters))
