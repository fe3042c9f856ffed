"""Bounded, mergeable summaries of a stream of rows: what it leaves behind, and what estimators read."""

from __future__ import annotations

from tdprobe._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
