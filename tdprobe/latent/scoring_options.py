"""How rows are scored where the user does not say, and what may be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdprobe.errors import CallError, ConfigError, unknown
from tdprobe.stream.outliers import MIN_ROWS

DEFAULT_PORTION = 512
# Four median lengths: in language models scores no longer depend on the limit from here down, and rows that are normal
# in two or more dimensions are this long less than once in 50,000.
DEFAULT_MAX_NORM = 4.0
# Groups of rows that are left out in turn to see how much scores vary.
DEFAULT_GROUPS = 8
DEFAULT_MEMORY = 2 * 2**30


def check_portion(portion: Any) -> None:
    """Refuse portions that are too small to be compared within.

    Raises:
        ConfigError: It is no int of at least 8.
    """
    if isinstance(portion, bool) or not isinstance(portion, int) or portion < MIN_ROWS:
        raise ConfigError(f"rows_per_update is a number of rows (an int of at least {MIN_ROWS}), got {portion!r}")


def check_scoring(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for errors, nulls, memory and the scale of rows, with their defaults.

    Raises:
        ConfigError: ``groups`` is neither 0 nor an int from 3 on, ``null`` is no int from 0 on, or another name.
    """
    found: dict[str, Any] = {"groups": DEFAULT_GROUPS, "null": 0, "memory_budget": DEFAULT_MEMORY, "rescale": None}
    for name in options:
        if name not in found:
            raise CallError(unknown("argument", name, found))
    found |= options
    groups, null, budget = found["groups"], found["null"], found["memory_budget"]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 0 or groups in (1, 2):
        raise ConfigError(f"groups of rows for standard errors are 0 (none) or an int from 3 on, got {groups!r}")
    if isinstance(null, bool) or not isinstance(null, int) or null < 0:
        raise ConfigError(f"null counts permutations (an int from 0 on, such as 99), got {null!r}")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ConfigError(f"memory_budget counts bytes (a number above 0, such as 2 * 2**30), got {budget!r}")
    return found
