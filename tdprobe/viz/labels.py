"""Short layer labels and colour ranges for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

ALPHA = 0.05


class Labels(NamedTuple):
    """Short names, and the pattern that says what was left out (``""`` if nothing was)."""

    short: tuple[str, ...]
    pattern: str


def shorten(names: Sequence[str]) -> Labels:
    """Leave out the leading and trailing parts that all names share.

    Example:
        >>> shorten(["model.layers.0", "model.layers.1"])
        Labels(short=('0', '1'), pattern='model.layers.*')
    """
    parts = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return Labels(tuple(names), "")
    head = _shared(parts)
    tail = _shared([part[head:][::-1] for part in parts])
    # A name that is a prefix of another one must keep at least one part.
    room = min(map(len, parts)) - 1
    head = min(head, room)
    tail = min(tail, room - head)
    short = tuple(".".join(part[head : len(part) - tail]) for part in parts)
    first = parts[0]
    pattern = ".".join([*first[:head], "*", *first[len(first) - tail :]]) if head or tail else ""
    return Labels(short, pattern)


def colour_range(values: np.ndarray, spec: Any | None = None) -> tuple[float, float]:
    """Return the ends of a colour scale: the estimator's bounds, and the data where it has none.

    Args:
        values: Scores of any shape; NaN and infinities are ignored.
        spec: Registry entry of the estimator, read for ``bounds``.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    bounds = spec.bounds if spec is not None and spec.bounds is not None else (None, None)
    # Unbiased scores leave their nominal bounds by a little; a clipped colour would hide that.
    if bounds[0] is not None and np.isfinite(bounds[0]):
        low = min(low, float(bounds[0]))
    if bounds[1] is not None and np.isfinite(bounds[1]):
        high = max(high, float(bounds[1]))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _shared(parts: Sequence[Sequence[str]]) -> int:
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def null_limit(p: np.ndarray | None) -> float | None:
    """Return the p above which a score counts as one that unrelated rows reach; ``None`` where no score does.

    0.05, or the smallest p where few permutations allow no p as small as that.
    """
    known = p[np.isfinite(p)] if p is not None else np.zeros(0)
    if not known.size:
        return None
    limit = max(ALPHA, float(known.min()))
    return limit if (known > limit).any() else None


def null_note(p: np.ndarray | None) -> str:
    """Say in a title what dots are."""
    limit = null_limit(p)
    return "" if limit is None else f"; dots: p > {limit:.2g}"
