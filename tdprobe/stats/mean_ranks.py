"""How far the nearest rows of one layer are in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdprobe._types import Bool, Float, Int
from tdprobe.stats.distances import EXACT_BLOCK, TIE
from tdprobe.stats.partners import Partners
from tdprobe.stats.precision import at_once
from tdprobe.stats.ranks_of_one import ranks_of_one
from tdprobe.stats.seen import Seen

# Partners up to which they are ranked one by one, rows in which that is done together, and the share of neighbours as
# near as the next one beyond which it is not: there each partner would have many others to be compared with.
MOST, ROWS, CROWDED = 256, 64, 0.5


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
    several = (counts > 1) & (counts < n - 1)
    alike = _one_point(seen.space.own, partners, several)
    single, several = (counts == 1) & (counts < n - 1) | alike, several & ~alike
    if bool(single.any()):
        other = torch.stack([found.first for found in partners], 1)
        ranks = torch.where(single, ranks_of_one(seen, other), ranks)
    apart = several & (counts <= MOST) & ~_crowded(seen).unsqueeze(1)
    if bool(apart.any()):
        ranks = torch.where(apart, _sums_one_by_one(seen, partners, apart) / counts, ranks)
        several &= ~apart
    for column in several.any(0).nonzero().flatten().tolist():
        (some,) = several[:, column].nonzero().unbind(1)
        most = max(seen.space.points, int(counts[some, column].max()))
        for part in some.split(max(1, at_once(EXACT_BLOCK, some.device) // most)):
            ranks[part, column] = _ranks_of_several(seen, partners[column], part)
    return ranks


def _one_point(
    own: Int[Tensor, "n"], partners: Sequence[Partners], several: Bool[Tensor, "r l"]
) -> Bool[Tensor, "r l"]:
    """Tell which of several partners are all one point, as copies are in every layer: they share a rank."""
    out = several.clone()
    for column in several.any(0).nonzero().flatten().tolist():
        row, other = partners[column].of(several[:, column])
        out[row[own[other] != own[partners[column].first[row]]], column] = False
    return out


def _crowded(seen: Seen) -> Bool[Tensor, "r"]:
    """Tell where points are as far as one another, up to what measures may be off, so often that all are in doubt."""
    slack = seen.slack(seen.near[:, -1].double() + seen.offset)
    return (seen.near.diff(dim=1) <= 2 * slack.unsqueeze(1)).double().mean(1) > CROWDED


def _sums_one_by_one(seen: Seen, partners: Sequence[Partners], apart: Bool[Tensor, "r l"]) -> Float[Tensor, "r l"]:
    """Rank every partner as if it were the only one, and sum the ranks of those of a row in each layer.

    Args:
        seen: Measures of the rows.
        partners: The nearest of the rows in each layer.
        apart: In which layers the partners of a row are asked for, at least once; other sums are 0.
    """
    total = torch.zeros(apart.shape, dtype=torch.float64, device=apart.device)
    asked = apart.any(0).nonzero().flatten().tolist()
    parts = [partners[column].of(apart[:, column]) for column in asked]
    row, order = torch.cat([row for row, _ in parts]).sort(stable=True)
    other = torch.cat([other for _, other in parts])[order]
    column = torch.cat([torch.full_like(row, column) for (row, _), column in zip(parts, asked, strict=True)])[order]
    lengths = torch.bincount(row, minlength=len(apart))
    starts = lengths.cumsum(0) - lengths
    # Rows with about as many partners together, so that little is padded.
    (some,) = lengths.nonzero().unbind(1)
    for rows in some[lengths[some].argsort()].split(at_once(ROWS, some.device)):
        count = lengths[rows].unsqueeze(1)
        within = torch.arange(int(count.max()), device=row.device)
        place, real = starts[rows].unsqueeze(1) + torch.minimum(within, count - 1), within < count
        found = ranks_of_one(seen.some(rows), other[place])
        total[rows] = torch.zeros_like(total[rows]).scatter_add_(1, column[place], found * real)
    return total


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
