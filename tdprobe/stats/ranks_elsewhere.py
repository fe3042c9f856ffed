"""How far the k nearest rows of one layer are in another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.distances import Space
from tdprobe.stats.mean_ranks import mean_ranks
from tdprobe.stats.neighborhoods import Neighborhoods
from tdprobe.stats.partners import Partners
from tdprobe.stats.seen import Seen

# Rows to know the order of, for each that is listed: most of the nearest ones elsewhere are among them.
NEAR = 3


@dataclass
class RanksElsewhere:
    """Average the ranks of the k nearest rows, for `mean_terms`: information imbalance with several neighbours.

    A row that is in by a share counts by that share, so that the order of tied rows never matters.

    Args:
        k: Neighbours.
    """

    k: int
    _data: list[Tensor] = field(default_factory=list)
    _spaces: list[Space] = field(default_factory=list)

    def __call__(self, hoods: Neighborhoods, data: list[Tensor]) -> Float[Tensor, "r l l"]:
        """Return ``2 / n`` times the mean rank in the layer of the column, ``(r, l, l)``.

        Args:
            hoods: The nearest rows of some rows.
            data: All rows of each layer.
        """
        if self._data is not data:
            # One data set after the other comes, each in blocks of rows.
            self._data, self._spaces = data, [Space(x) for x in data]
        ranks = torch.stack([_ranks(space, hoods) for space in self._spaces], -1)
        weighted = (hoods.share.unsqueeze(-1) * ranks).sum(2) / self.k
        return 2 / hoods.total * weighted.movedim(0, 1)


def _ranks(space: Space, hoods: Neighborhoods) -> Float[Tensor, "l r s"]:
    """Rank all rows that are listed, in one layer; any number where the list is shorter."""
    layers, count, length = hoods.other.shape
    # What is no row has a share of 0.
    some = torch.where(hoods.share > 0, hoods.other, (hoods.rows.unsqueeze(1) + 1) % hoods.total)
    one_each, place = torch.ones_like(hoods.rows), torch.arange(count, device=hoods.rows.device)
    partners = [Partners(place, other, one_each) for other in some.movedim(1, 2).flatten(0, 1)]
    seen = Seen.of(space, hoods.rows, space.block(hoods.rows), NEAR * length)
    found = mean_ranks(seen, partners)
    return found.mT.unflatten(0, (layers, length)).movedim(1, 2)
