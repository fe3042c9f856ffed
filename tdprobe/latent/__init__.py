"""Methods on latent activations: caching, scoring, similarity."""

from __future__ import annotations

from tdprobe._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
