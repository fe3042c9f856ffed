"""Places that a context listens to or writes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Site:
    """One place that a context listens to or writes to.

    Attributes:
        name: Dotted module name.
        direction: One of the six directions.
        n_fired: How often the hook has acted.
    """

    name: str
    direction: str = "fwd"
    n_fired: int = 0
