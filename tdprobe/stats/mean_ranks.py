"""How far the nearest rows of one layer are in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.stats.distances import EXACT_BLOCK, TIE
from tdprobe.stats.partners import Partners
from tdprobe.stats.precision import at_once
from tdprobe.stats.ranks_of_one import ranks_of_one
from tdprobe.stats.seen import Seen


def mean_ranks(seen: Seen, partners: Sequence[Partners]) -> Float[Tensor, "r l"]:
    """Return the mean rank, in this layer, of the nearest rows of l other layers.

    The rank of row j for row i is the number of rows nearer to i than j, plus half of the number of rows at the
    distance of j, itself included, plus one half: 1 for the nearest, n - 1 for the farthest, and the mean of the
    tied places where rows are tied.

    Args:
        seen: Measures of some rows in the layer.
        partners: The nearest of these rows in each of the other layers.
    """
    n, counts = len(seen.space.rows), torch.stack([found.counts for found in partners], 1)
    # Where all other rows are tied, their mean rank is the same in every layer.
    ranks = torch.full(counts.shape, n / 2, dtype=torch.float64, device=counts.device)
    single = (counts == 1) & (counts < n - 1)
    if bool(single.any()):
        other = torch.stack([found.first for found in partners], 1)
        ranks = torch.where(single, ranks_of_one(seen, other), ranks)
    several = (counts > 1) & (counts < n - 1)
    for column in several.any(0).nonzero().flatten().tolist():
        (some,) = several[:, column].nonzero().unbind(1)
        most = max(seen.space.points, int(counts[some, column].max()))
        for part in some.split(max(1, at_once(EXACT_BLOCK, some.device) // most)):
            ranks[part, column] = _ranks_of_several(seen, partners[column], part)
    return ranks


def _ranks_of_several(seen: Seen, partners: Partners, some: Tensor) -> Tensor:
    """Rank all partners of some rows at once: each point counts for the partners that it is nearer than."""
    seen, targets = seen.some(some), _padded_targets(seen, partners, some)
    space, rows, block = seen.space, seen.rows, seen.block
    counts = partners.counts[some].unsqueeze(1)
    farthest = targets.gather(1, counts - 1).squeeze(1)
    slack, lacking = seen.slack(farthest).unsqueeze(1), targets - seen.offset.unsqueeze(1)
    low, high = ((lacking + sign * slack).to(block.dtype) for sign in (-1, 1))
    sure, perhaps = _farther(low, block, counts), _as_far(high, block, counts)
    nearer_than = (sure + perhaps).double() / 2
    row, column = (sure != perhaps).nonzero().unbind(1)
    if len(row):
        exact = torch.full_like(block, torch.inf, dtype=torch.float64)
        exact[row, column] = space.exact(rows[row], column)
        nearer_than[row, column] = _beyond(targets, exact, counts)[row, column]
    copies = (space.repeats[space.own[rows]] - 1).double().unsqueeze(1)
    own = copies * _beyond(targets, torch.zeros_like(copies), counts)
    total = nearer_than @ space.repeats.double().unsqueeze(1) + own
    return (total / counts + 0.5).squeeze(1)


def _padded_targets(seen: Seen, partners: Partners, some: Tensor) -> Tensor:
    """Return the measures of the partners of some rows, ascending, padded with infinity."""
    places = torch.full_like(partners.counts, -1)
    places[some] = torch.arange(len(some), device=some.device)
    taken = places[partners.row] >= 0
    row, other = partners.row[taken], partners.other[taken]
    within = torch.arange(len(row), device=row.device)
    within -= torch.searchsorted(row, row)
    out = torch.full((len(some), int(within.max()) + 1), torch.inf, dtype=torch.float64, device=row.device)
    out[places[row], within] = seen.space.exact(seen.rows[row], seen.space.own[other])
    return out.sort(1).values


def _beyond(targets: Tensor, measure: Tensor, counts: Tensor) -> Tensor:
    """Count the targets beyond each measure, those tied with it by half."""
    farther = _farther(targets * (1 - TIE), measure, counts)
    return (farther + _as_far(targets * (1 + TIE), measure, counts)).double() / 2


def _farther(targets: Tensor, measure: Tensor, counts: Tensor) -> Tensor:
    # An infinite measure is not nearer than the padding.
    return (counts - torch.searchsorted(targets, measure, right=True)).clamp(min=0)


def _as_far(targets: Tensor, measure: Tensor, counts: Tensor) -> Tensor:
    return counts - torch.searchsorted(targets, measure)
