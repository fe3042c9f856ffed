"""Look inside live neural networks: cache activations, score every pair of layers, compare checkpoints."""

from __future__ import annotations

from tdprobe._lazy import lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
