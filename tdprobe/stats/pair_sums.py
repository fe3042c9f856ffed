"""Sums over pairs of rows, and the similarities that come of them for all pairs of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.jackknife import jackknife_se


@dataclass(frozen=True)
class PairSums:
    """Hold sums of one kernel over the pairs of different rows i, j, for l layers, in g groups of rows.

    With ``A_ij = K_ij - u_i - u_j``, ``u`` being the shift of a layer:

    Attributes:
        products: ``sum A_ij B_ij`` over i in one group and j in another, ``(*lead, g, g, l, l)`` float64.
        sums: ``sum_j A_ij`` over j in a group, ``(*lead, g, l, n)`` float64.
        shift: ``(*lead, l, n)`` float64.
        diagonal: ``K_ii``, ``(*lead, l, n)`` float64.
        spread: Sum of squared distances of rows to their mean, ``(*lead, l)``, in any unit.
        power: Sum of squared rows before centring, in that unit.
        group: Group of each row, ``(n,)`` int64.
        noise: Variance relative to the mean square that is but rounding.
    """

    products: Tensor
    sums: Tensor
    shift: Tensor
    diagonal: Tensor
    spread: Tensor
    power: Tensor
    group: Tensor
    noise: float

    @property
    def n(self) -> int:
        """Count the rows."""
        return len(self.group)

    def without(self, group: int) -> PairSums:
        """Return the sums over the rows outside of a group."""
        kept = torch.arange(self.products.shape[-3], device=self.group.device) != group
        held = self.group != group
        new = {name: getattr(self, name)[..., held] for name in ("sums", "shift", "diagonal")}
        new["sums"] = new["sums"][..., kept, :, :]
        new["products"] = self.products[..., kept, :, :, :][..., kept, :, :]
        same = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in new}
        return PairSums(**new, **{**same, "group": self.group[held]})

    def se(self, score: Callable[[PairSums], Tensor]) -> Float[Tensor, "*lead l l"]:
        """Estimate the standard error of a score by leaving out one group after the other."""
        sizes = torch.bincount(self.group, minlength=self.products.shape[-3]).double()
        whole = score(self)
        if not self.n:
            return torch.full_like(whole, torch.nan)
        return jackknife_se(whole, torch.stack([score(self.without(g)) for g in range(len(sizes))]), sizes)

    def alignment(self, unbiased: bool) -> Float[Tensor, "*lead l l"]:
        """Compute the cosine of the centred kernels of all pairs of layers.

        Biased: of ``H K H``, with H the centring matrix. Unbiased (HSIC_1, U-centring): diagonals are zero, and

        ``sum_ij A_ij B_ij - 2 / (n-2) sum_i a_i b_i + a b / ((n-1) (n-2))``, with row sums ``a_i`` and totals ``a``.

        Neither depends on the shift. Layers without variance score NaN, as do fewer than 2 rows, unbiased 4.
        """
        n, own = self.n, self._mean_square()
        if n < (4 if unbiased else 2):
            return torch.full_like(self._total(), torch.nan)
        products, rows = self._total(), self.sums.sum(-3)
        if unbiased:
            edge, grand = 2 / (n - 2), 1 / ((n - 1) * (n - 2))
        else:
            diagonal = self.diagonal - 2 * self.shift
            products, rows = products + diagonal @ diagonal.mT, rows + diagonal
            own = own + self.diagonal.square().sum(-1)
            edge, grand = 2 / n, 1 / n**2
        total = rows.sum(-1)
        return self._cosine(products - edge * (rows @ rows.mT) + grand * _outer(total), own)

    def correlation(self) -> Float[Tensor, "*lead l l"]:
        """Compute the Pearson correlation of ``K_ij`` over all i < j, of all pairs of layers.

        NaN for layers without variance, and for fewer than 3 rows.
        """
        n = self.n
        if n < 3:
            return torch.full_like(self._total(), torch.nan)
        # A constant changes nothing, and without it there is less to cancel.
        shift = self.shift - self.shift.mean(-1, keepdim=True)
        total = self.sums.sum((-3, -1)) + 2 * (n - 1) * shift.sum(-1)
        return self._cosine(self._plain(shift) - _outer(total) / (n * (n - 1)), self._mean_square())

    def cosine(self) -> Float[Tensor, "*lead l l"]:
        """Compute the cosine of ``K_ij`` over all i, j that differ."""
        return self._cosine(self._plain(self.shift), self._mean_square())

    def _total(self) -> Tensor:
        return self.products.sum((-4, -3))

    def _plain(self, shift: Tensor) -> Tensor:
        """Return ``sum (A_ij + u_i + u_j) (B_ij + v_i + v_j)``."""
        rows, ends = self.sums.sum(-3), shift.sum(-1)
        mixed = rows @ shift.mT
        return self._total() + 2 * (mixed + mixed.mT + (self.n - 2) * (shift @ shift.mT) + _outer(ends))

    def _mean_square(self) -> Tensor:
        return self._plain(self.shift).diagonal(dim1=-2, dim2=-1)

    def _cosine(self, products: Tensor, scale: Tensor) -> Tensor:
        own = products.diagonal(dim1=-2, dim2=-1)
        # Written so that NaN is without variance too.
        own = torch.where((own > 0) & (own > self.noise * scale), own, torch.nan).sqrt()
        return products / _outer(own)


def _outer(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) * x.unsqueeze(-2)
