"""Which rows are nearest, given their inner products: ties as the given values have them, whatever products round."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Bool, Float, Int
from tdprobe.stats.distances import TIE
from tdprobe.stats.kernel_layer import Rows
from tdprobe.stats.order import smallest
from tdprobe.stats.precision import at_once

# Candidates beyond the wanted neighbours, which differences in float64 tell apart.
MARGIN = 6
# Numbers in one step of differences, and of rows that are compared with all others.
STEP, CROWD = 2**20, 2**20


class KernelNeighbors:
    """Find the rows that are as near as the k-th nearest one, by Euclidean distance.

    Args:
        given: The rows as they came, ``(n, d)`` finite.
        points: The same, made ready for products.
        k: Neighbours of each row, less than n.
    """

    def __init__(self, given: Float[Tensor, "n d"], points: Rows, k: int) -> None:
        self.given, self.points, self.k = given, points, k

    def keep(self, rows: Int[Tensor, "r"], gram: Tensor, square: Tensor, out: Tensor) -> None:
        """Write the inner products with the nearest rows, and leave the rest of ``out`` as it is.

        Args:
            rows: Places of some rows.
            gram: Their inner products with all rows, ``(r, n)``.
            square: Their squared distances to all rows by products, ``(r, n)``; overwritten.
            out: ``(r, n)``.
        """
        square.scatter_(1, rows.unsqueeze(1), torch.inf)
        others = square.shape[1] - 1
        fast, places = smallest(square, min(self.k + MARGIN, others))
        exact = self._exact(rows.repeat_interleave(places.shape[1]), places.flatten()).view(places.shape)
        near, reach = self._nearest(exact)
        out.scatter_(1, places, gram.gather(1, places).mul_(near))
        if places.shape[1] == others:
            return
        # Where rows that are no candidates may be as near, all that may be are compared.
        reach += self._rounding(rows, reach)
        crowded = (fast[:, -1:] <= reach).squeeze(1).nonzero().squeeze(1)
        for some in crowded.split(max(1, at_once(CROWD, rows.device) // square.shape[1])):
            row, column = (square[some] <= reach[some]).nonzero().unbind(1)
            exact = torch.full((len(some), others + 1), torch.inf, dtype=torch.float64, device=rows.device)
            exact[row, column] = self._exact(rows[some[row]], column)
            out[some] = gram[some].mul_(self._nearest(exact)[0])

    def _nearest(self, exact: Float[Tensor, "r m"]) -> tuple[Bool[Tensor, "r m"], Float[Tensor, "r 1"]]:
        """Tell which numbers of each row are not above its k-th smallest, which is returned too."""
        reach = exact.kthvalue(self.k, dim=1, keepdim=True).values
        return exact <= reach * (1 + TIE), reach

    def _exact(self, rows: Int[Tensor, "m"], others: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
        """Return the squared distances of pairs of rows, float64, from the differences of given values."""
        found = []
        size = max(1, at_once(STEP, rows.device) // max(1, self.given.shape[1]))
        for some, partners in zip(rows.split(size), others.split(size), strict=True):
            gap = self.given.index_select(0, some).double().sub_(self.given.index_select(0, partners))
            found.append(gap.mul_(self.points.scale).square_().sum(1))
        return torch.cat(found)

    def _rounding(self, rows: Int[Tensor, "r"], reach: Float[Tensor, "r 1"]) -> Float[Tensor, "r 1"]:
        """Bound how far squared distances by products are off, up to a reach.

        The error of a product of d terms is at most ``d u |x| |y|`` (Higham 2002, section 3.1), with
        ``4 |x| |y| <= (|x| + |y|)^2`` and ``|y| <= |x| + distance``; a point itself is off by a few ``u |x|``.
        """
        gamma = (self.given.shape[1] + 16) * torch.finfo(self.points.points.dtype).eps
        total = 2 * self.points.lengths[rows].sqrt().unsqueeze(1) + reach.sqrt()
        return gamma * total.square() + self.points.noise + TIE * reach
