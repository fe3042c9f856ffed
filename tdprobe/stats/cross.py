"""Cross products of every pair of layers: exact linear CKA, biased or unbiased, from a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
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


def _pairs(layers: int) -> Iterator[tuple[int, int, str]]:
    return ((i, j, f"{i}-{j}") for i in range(layers) for j in range(i, layers))


class CrossState(State):
    """Hold centred moments of all layer pairs; with rows ``x_i`` centred over all that was seen.

    Attributes:
        n: Rows seen, int64.
        mu: Layer index (``"0"``, ...) -> column means ``(*lead, d)`` float64.
        cross: ``"i-j"`` with i <= j -> ``sum x_i x_j'``, ``(*lead, d_i, d_j)`` float64.
        cubic: Layer index -> ``sum x_i |x_j|^2`` for all j, ``(*lead, d_i, l)`` float64; empty if biased.
        quartic: ``sum |x_i|^2 |x_j|^2``, ``(*lead, l, l)`` float64; ``(*lead, 0, 0)`` if biased.
    """

    n: Tensor
    mu: TensorDict
    cross: TensorDict
    cubic: TensorDict
    quartic: Tensor

    @property
    def unbiased(self) -> bool:
        """Tell whether the sums behind the unbiased product are kept."""
        return not self.cubic.is_empty()

    @property
    def spread(self) -> Float[Tensor, "*lead l"]:
        """Sum of squared distances to the mean, per layer."""
        scatters = [self.cross[f"{i}-{i}"] for i in range(len(self.mu.keys()))]
        return torch.stack([c.diagonal(dim1=-2, dim2=-1).sum(-1) for c in scatters], -1)

    @property
    def power(self) -> Float[Tensor, "*lead l"]:
        """Sum of squared norms before centring, per layer."""
        return self.spread + self.n * torch.stack([mu.square().sum(-1) for mu in layer_list(self.mu)], -1)

    @property
    def hsic(self) -> Float[Tensor, "*lead l l"]:
        """Compute ``|C_ij|_F^2``, or HSIC_1 where the state is unbiased (see `gram_products`)."""
        layers, n = len(self.mu.keys()), self.n
        squares = {key: self.cross[key].square().sum((-2, -1)) for _, _, key in _pairs(layers)}
        full = torch.stack([squares[_key(i, j)] for i in range(layers) for j in range(layers)], -1)
        plain = full.unflatten(-1, (layers, layers))
        if not self.unbiased:
            return plain
        if int(n) < 4:
            raise ConfigError(f"got {int(n)} rows; the unbiased product needs at least 4: add rows first")
        total = self.spread
        corrected = plain - self.quartic + total.unsqueeze(-1) * total.unsqueeze(-2) / ((n - 1) * (n - 2))
        return (corrected - 2 * self.quartic / (n - 2)) / (n * (n - 3))

    def merge(self, other: CrossState) -> CrossState:
        """Join two streams: both are moved to the common mean, where every sum simply adds."""
        ours, theirs = layer_list(self.mu), layer_list(other.mu)
        check_widths([mu.unsqueeze(-2) for mu in theirs], [tuple(mu.shape) for mu in ours])
        if self.unbiased != other.unbiased:
            raise ConfigError("cannot merge a biased with an unbiased state; use one Cross(unbiased=...)")
        n = self.n + other.n
        share = other.n / n.clamp(min=1).double()
        gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
        cross = {}
        for i, j, key in _pairs(len(gaps)):
            weighted = (self.n * share * gaps[i]).unsqueeze(-1)
            cross[key] = (self.cross[key] + other.cross[key]).addcmul_(weighted, gaps[j].unsqueeze(-2))
        cubic, quartic = self.cubic, self.quartic
        if self.unbiased:
            cubic_a, quartic_a = _moved(self, [share * gap for gap in gaps])
            cubic_b, quartic_b = _moved(other, [(share - 1) * gap for gap in gaps])
            cubic = by_layer(a + b for a, b in zip(cubic_a, cubic_b, strict=True))
            quartic = quartic_a + quartic_b
        mu = by_layer(a + share * gap for a, gap in zip(ours, gaps, strict=True))
        return CrossState(n=n, mu=mu, cross=TensorDict(cross), cubic=cubic, quartic=quartic)


def _key(i: int, j: int) -> str:
    return f"{min(i, j)}-{max(i, j)}"


def _moved(state: CrossState, steps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Move the origin by ``steps`` (s): expand the sums with x' = x - s, k' = k - 2 s.x + |s|^2, sum x = 0.

    ``sum x_i' k_j' = P_ij - s_i (t_j + n g_j) - 2 C_ij s_j`` and
    ``sum k_i' k_j' = Q_ij - 2 (s_i.P_ij + s_j.P_ji) + 4 s_i.C_ij s_j + t_i g_j + g_i t_j + n g_i g_j``,
    with ``t = sum k`` and ``g = |s|^2``.
    """
    layers, n, t = len(steps), state.n, state.spread
    g = torch.stack([s.square().sum(-1) for s in steps], -1)
    cubic, linear, bilinear = [], [], []
    for i, own in enumerate(layer_list(state.cubic)):
        blocks = [state.cross[_key(i, j)] if i <= j else state.cross[_key(i, j)].mT for j in range(layers)]
        pulled = torch.cat([c @ s.unsqueeze(-1) for c, s in zip(blocks, steps, strict=True)], -1)
        step = steps[i].unsqueeze(-1)
        cubic.append(own - step * (t + n * g).unsqueeze(-2) - 2 * pulled)
        linear.append((step * own).sum(-2))
        bilinear.append((step * pulled).sum(-2))
    lin, bil = torch.stack(linear, -2), torch.stack(bilinear, -2)
    outer = t.unsqueeze(-1) * g.unsqueeze(-2)
    quartic = state.quartic - 2 * (lin + lin.mT) + 4 * bil + outer + outer.mT
    return cubic, quartic + n * g.unsqueeze(-1) * g.unsqueeze(-2)


@dataclass(frozen=True)
class Cross(Statistic):
    """Keep what exact linear CKA of every layer pair needs, whatever the batches were.

    The sums are central moments (second order; up to fourth for the unbiased product), so nothing cancels at
    any offset and a merge is exact: the Gram matrices of HSIC_1 enter only through ``|C_ij|^2``, ``sum k_i``
    and ``sum k_i k_j``, with ``k`` the squared norms of centred rows.

    Args:
        unbiased: Keep the third and fourth order sums of HSIC_1 as well.

    Example:
        >>> Cross().nbytes([2, 3])  # 2 + 3 means, 4 + 6 + 9 products and a count, 8 bytes each
        200

    References:
        Song et al. 2012, Feature selection via dependence maximization, eq. 5.
        Chan, Golub, LeVeque 1983, Algorithms for computing the sample variance.
    """

    name: ClassVar[str] = "cross"
    unbiased: bool = False

    @property
    def route(self) -> str:
        """Say what is kept."""
        return "cross-covariances"

    def nbytes(self, widths: Sequence[int], data_sets: int = 1) -> int:
        """Return the size of a state in bytes, so that a caller can refuse before allocating it.

        Args:
            widths: Width of each layer.
            data_sets: Product of the leading dimensions.
        """
        layers = len(widths)
        numbers = sum(widths) + sum(widths[i] * widths[j] for i, j, _ in _pairs(layers))
        numbers += (sum(widths) * layers + layers**2) * self.unbiased
        return 8 * (1 + data_sets * numbers)

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> CrossState:
        """Return zero sums for the layers of ``rows``."""
        working_dtype(rows)
        lead, device, layers = rows[0].shape[:-2], rows[0].device, len(rows)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*lead, *shape, dtype=torch.float64, device=device)

        width = [x.shape[-1] for x in rows]
        kept = layers if self.unbiased else 0
        return CrossState(
            n=torch.zeros((), dtype=torch.int64, device=device),
            mu=by_layer(map(zeros, width)),
            cross=TensorDict({key: zeros(width[i], width[j]) for i, j, key in _pairs(layers)}),
            cubic=by_layer(zeros(d, layers) for d in width[:kept]),
            quartic=zeros(kept, kept),
        )

    @undisturbed
    def update(self, state: CrossState, rows: Sequence[Tensor], ids: Tensor) -> CrossState:
        """Merge the sums of ``rows`` into the state."""
        check_widths(rows, [tuple(mu.shape) for mu in layer_list(state.mu)])
        n, dtype = rows[0].shape[-2], working_dtype(rows)
        if n == 0:
            return state
        centred, mu = zip(*(centre(x, dtype) for x in rows), strict=True)
        cubic, quartic = state.cubic, state.quartic
        if self.unbiased:
            k = torch.stack([y.square().sum(-1) for y in centred], -1)
            cubic = by_layer((y.mT @ k).double() for y in centred)
            quartic = k.double().mT @ k.double()
        batch = CrossState(
            n=torch.full_like(state.n, n),
            mu=by_layer(mu),
            cross=TensorDict({key: (centred[i].mT @ centred[j]).double() for i, j, key in _pairs(len(rows))}),
            cubic=cubic,
            quartic=quartic,
        )
        return state.merge(batch)
