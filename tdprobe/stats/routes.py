"""Several routes to one value: which of them takes the least work within memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tdprobe.stats.state import Statistic


def cheapest(routes: Sequence[Statistic], widths: Sequence[int], n: int, budget: float = math.inf) -> Statistic:
    """Return the statistic that takes the fewest multiplications for rows that come in one update.

    With n rows of l layers, S columns in all and Q their sum of squares, cross-covariances take ``n (S^2 + Q) / 2`` and
    Grams ``n^2 (S + l^2) / 2``: Grams are cheaper up to about S rows, three times the width for two layers.

    Args:
        routes: Statistics from which a score is the same, two or more that know their `Statistic.work`, or one.
        widths: Width of each layer.
        n: Rows.
        budget: Bytes that a state may take; where all take more, the smallest one is returned.

    Example:
        >>> from tdprobe.stats import Cross, Gram
        >>> [cheapest([Cross(), Gram()], [576] * 30, n).name for n in (2048, 32768)]
        ['gram', 'cross']
    """
    within = [route for route in routes if route.nbytes(widths) <= budget]
    if not within:
        return min(routes, key=lambda route: route.nbytes(widths))
    return min(within, key=lambda route: route.work(widths, n)) if len(within) > 1 else within[0]
