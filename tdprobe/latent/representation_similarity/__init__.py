"""How similar two representations of the same samples are."""

from __future__ import annotations

from tdprobe._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
