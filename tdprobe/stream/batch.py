"""The rows of every layer for one batch of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdprobe.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Hold the same samples as seen in every layer.

    Args:
        rows: Layer name -> rows ``(*lead, n, d_layer)``; the same n in every layer.
        ids: Stable id of each sample, ``(n,)`` int64.

    Raises:
        ConfigError: No layers, a tensor of one dimension, layers of unequal n, or ids that do not fit.

    Example:
        >>> Batch({"layers.0": torch.zeros(3, 8)}, torch.arange(3)).n
        3
    """

    rows: Mapping[str, Tensor]
    ids: Tensor

    def __post_init__(self) -> None:
        """Check what every statistic relies on."""
        if not self.rows:
            raise ConfigError("got a batch without layers; give the rows of one layer at least")
        for name, x in self.rows.items():
            if x.ndim < 2:
                raise ConfigError(f"{name!r} has shape {tuple(x.shape)}; it must be (n, d) or (*lead, n, d)")
        usual = Counter(x.shape[-2] for x in self.rows.values()).most_common(1)[0][0]
        odd = {name: x.shape[-2] for name, x in self.rows.items() if x.shape[-2] != usual}
        if odd:
            found = ", ".join(f"{name!r} has {n} rows" for name, n in odd.items())
            alike = ", ".join(repr(name) for name in self.rows if name not in odd)
            raise ConfigError(f"{found}, but {alike} {usual}; every layer needs one row for every sample")
        if self.ids.shape != (usual,) or self.ids.dtype != torch.int64:
            raise ConfigError(
                f"ids have shape {tuple(self.ids.shape)} and dtype {self.ids.dtype}; give one id per row: "
                f"({usual},) torch.int64"
            )

    @property
    def n(self) -> int:
        """Count the samples."""
        return len(self.ids)
