"""Centred moments of every pair of layers: how they are kept, merged and read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.stats.sketch import fourth_moments
from tdprobe.stats.state import State, by_layer, check_widths, layer_list


def pairs(layers: int) -> Iterator[tuple[int, int, str]]:
    """Walk over the pairs of layers, each once, with the key of their product."""
    return ((i, j, f"{i}-{j}") for i in range(layers) for j in range(i, layers))


class CrossState(State):
    """Hold centred moments of all layer pairs; with rows ``x_i`` centred over all that was seen, maybe sketched.

    Attributes:
        n: Rows seen, int64.
        mu: Layer index (``"0"``, ...) -> column means ``(*lead, d)`` float64.
        cross: ``"i-j"`` with i <= j -> ``sum x_i x_j'``, ``(*lead, d_i, d_j)`` float64; see `block`.
        cubic: Layer index -> ``sum x_i |x_j|^2`` for all j, ``(*lead, d_i, l)`` float64; empty if biased.
        quartic: ``sum |x_i|^2 |x_j|^2``, ``(*lead, l, l)`` float64; ``(*lead, 0, 0)`` if biased.
        widths: Columns of each layer before sketching, ``(l,)`` int64.
        sketch: Columns of a sketch, 0 without, and its seed, ``(2,)`` int64.
        precision: Rounding unit of the products, the largest of all updates, float64.
    """

    n: Tensor
    mu: TensorDict
    cross: TensorDict
    cubic: TensorDict
    quartic: Tensor
    widths: Tensor
    sketch: Tensor
    precision: Tensor

    @property
    def unbiased(self) -> bool:
        """Tell whether the sums behind the unbiased product are kept."""
        return not self.cubic.is_empty()

    @property
    def plain(self) -> CrossState:
        """The same without the sums behind the unbiased product."""
        empty = self.quartic.new_zeros(*self.quartic.shape[:-2], 0, 0)
        return self.replaced(cubic=TensorDict({}), quartic=empty) if self.unbiased else self

    @property
    def columns(self) -> list[int]:
        """Columns of each layer as they are kept."""
        return [mu.shape[-1] for mu in layer_list(self.mu)]

    def block(self, i: int, j: int) -> Float[Tensor, "*lead d_i d_j"]:
        """Return ``sum x_i x_j'``."""
        return self.cross[f"{i}-{j}"] if i <= j else self.cross[f"{j}-{i}"].mT

    @property
    def spread(self) -> Float[Tensor, "*lead l"]:
        """Sum of squared distances to the mean, per layer."""
        scatters = [self.block(i, i) for i in range(len(self.columns))]
        return torch.stack([c.diagonal(dim1=-2, dim2=-1).sum(-1) for c in scatters], -1)

    @property
    def power(self) -> Float[Tensor, "*lead l"]:
        """Sum of squared norms before centring, per layer."""
        return self.spread + self.n * torch.stack([mu.square().sum(-1) for mu in layer_list(self.mu)], -1)

    @property
    def hsic(self) -> Float[Tensor, "*lead l l"]:
        """Compute ``|C_ij|_F^2``, or HSIC_1 where the state is unbiased (see `gram_products`).

        Of a sketch the value is right on average over maps: for different layers as it is, and for a layer with
        itself by taking out what its own map adds.
        """
        n, total = self.n, self.spread
        plain, outer = self._squares(), total.unsqueeze(-1) * total.unsqueeze(-2)
        plain, outer, quartic = self._without_sketch(plain, outer, self.quartic)
        if not self.unbiased:
            return plain
        if int(n) < 4:
            raise ConfigError(f"got {int(n)} rows; the unbiased product needs at least 4: add rows first")
        corrected = plain - quartic + outer / ((n - 1) * (n - 2))
        return (corrected - 2 * quartic / (n - 2)) / (n * (n - 3))

    def _squares(self) -> Float[Tensor, "*lead l l"]:
        layers = range(len(self.columns))
        squares = {key: self.cross[key].square().sum((-2, -1)) for _, _, key in pairs(len(layers))}
        full = torch.stack([squares[f"{min(i, j)}-{max(i, j)}"] for i in layers for j in layers], -1)
        return full.unflatten(-1, (len(layers), len(layers)))

    def _without_sketch(self, plain: Tensor, outer: Tensor, quartic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Solve the moments of `fourth_moments` for what the diagonals would be without a sketch."""
        if not int(self.sketch[0]):
            return plain, outer, quartic
        moments = [fourth_moments(d, k) for d, k in zip(self.widths.tolist(), self.columns, strict=True)]
        a, b = torch.tensor(moments, dtype=torch.float64, device=plain.device).unbind(-1)
        scatter, trace = (x.diagonal(dim1=-2, dim2=-1) for x in (plain, outer))
        det = a * (a + b) - 2 * b**2
        own = (a * scatter - b * trace) / det, ((a + b) * trace - 2 * b * scatter) / det
        plain, outer = (x + (y - z).diag_embed() for x, y, z in zip((plain, outer), own, (scatter, trace), strict=True))
        return plain, outer, quartic / (1 + (a + 2 * b - 1).diag_embed()) if self.unbiased else quartic

    def merge(self, other: CrossState) -> CrossState:
        """Join two streams: both are moved to the common mean, where every sum simply adds."""
        ours, theirs = layer_list(self.mu), layer_list(other.mu)
        check_widths([mu.unsqueeze(-2) for mu in theirs], [tuple(mu.shape) for mu in ours])
        if self.unbiased != other.unbiased:
            raise ConfigError("cannot merge a biased with an unbiased state; use one Cross(unbiased=...), or its plain")
        if self.sketch.tolist() != other.sketch.tolist() or self.widths.tolist() != other.widths.tolist():
            raise ConfigError(
                f"cannot merge sums over layer widths {self.widths.tolist()} (sketch, seed: {self.sketch.tolist()}) "
                f"and {other.widths.tolist()} ({other.sketch.tolist()}); use one Cross(sketch=..., seed=...) for both"
            )
        n = self.n + other.n
        share = other.n / n.clamp(min=1).double()
        gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
        cross = {}
        for i, j, key in pairs(len(gaps)):
            weighted = (self.n * share * gaps[i]).unsqueeze(-1)
            cross[key] = (self.cross[key] + other.cross[key]).addcmul_(weighted, gaps[j].unsqueeze(-2))
        cubic, quartic = self.cubic, self.quartic
        if self.unbiased:
            cubic_a, quartic_a = _moved(self, [share * gap for gap in gaps])
            cubic_b, quartic_b = _moved(other, [(share - 1) * gap for gap in gaps])
            cubic = by_layer(a + b for a, b in zip(cubic_a, cubic_b, strict=True))
            quartic = quartic_a + quartic_b
        mu = by_layer(a + share * gap for a, gap in zip(ours, gaps, strict=True))
        precision = torch.maximum(self.precision, other.precision)
        return self.replaced(n=n, mu=mu, cross=TensorDict(cross), cubic=cubic, quartic=quartic, precision=precision)

    def replaced(self, **fields: Tensor | TensorDict) -> CrossState:
        """Return a state over the same layers with other values."""
        names = ("n", "mu", "cross", "cubic", "quartic", "widths", "sketch", "precision")
        return CrossState(**{name: fields.get(name, getattr(self, name)) for name in names})


def _moved(state: CrossState, steps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Move the origin by ``steps`` (s): expand the sums with x' = x - s, k' = k - 2 s.x + |s|^2, sum x = 0.

    ``sum x_i' k_j' = P_ij - s_i (t_j + n g_j) - 2 C_ij s_j`` and
    ``sum k_i' k_j' = Q_ij - 2 (s_i.P_ij + s_j.P_ji) + 4 s_i.C_ij s_j + t_i g_j + g_i t_j + n g_i g_j``,
    with ``t = sum k`` and ``g = |s|^2``.
    """
    n, t = state.n, state.spread
    g = torch.stack([s.square().sum(-1) for s in steps], -1)
    cubic, linear, bilinear = [], [], []
    for i, own in enumerate(layer_list(state.cubic)):
        pulled = torch.cat([state.block(i, j) @ s.unsqueeze(-1) for j, s in enumerate(steps)], -1)
        step = steps[i].unsqueeze(-1)
        cubic.append(own - step * (t + n * g).unsqueeze(-2) - 2 * pulled)
        linear.append((step * own).sum(-2))
        bilinear.append((step * pulled).sum(-2))
    lin, bil = torch.stack(linear, -2), torch.stack(bilinear, -2)
    outer = t.unsqueeze(-1) * g.unsqueeze(-2)
    quartic = state.quartic - 2 * (lin + lin.mT) + 4 * bil + outer + outer.mT
    return cubic, quartic + n * g.unsqueeze(-1) * g.unsqueeze(-2)
