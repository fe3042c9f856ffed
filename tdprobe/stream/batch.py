"""The rows of every layer for one batch of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdprobe.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Hold the same samples as seen in every layer.

    Args:
        rows: Layer name -> rows ``(*lead, n, d_layer)``; the same n in every layer.
        ids: Stable id of each sample, ``(n,)`` int64.
        targets: Key -> what else is known of the samples, ``(*lead, n, m)``, such as labels or attributes.

    Raises:
        ConfigError: No layers, a tensor of one dimension, layers of unequal n, or ids or targets that do not fit.

    Example:
        >>> Batch({"layers.0": torch.zeros(3, 8)}, torch.arange(3)).n
        3
    """

    rows: Mapping[str, Tensor]
    ids: Tensor
    targets: Mapping[str, Tensor] = field(default_factory=dict)

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
        for key, value in self.targets.items():
            if value.ndim < 2 or value.shape[-2] != usual:
                raise ConfigError(
                    f"{key!r} has shape {tuple(value.shape)}, the layers have {usual} rows; give one row of values "
                    f"for every sample: ({usual}, m)"
                )

    @property
    def n(self) -> int:
        """Count the samples."""
        return len(self.ids)

    def select(self, index: slice | Tensor) -> Batch:
        """Return the samples of an index, or of a slice, which copies nothing."""

        def taken(x: Tensor) -> Tensor:
            return x[..., index, :] if isinstance(index, slice) else x.index_select(-2, index.to(x.device))

        rows = {name: taken(x) for name, x in self.rows.items()}
        ids = self.ids[index if isinstance(index, slice) else index.to(self.ids.device)]
        return Batch(rows, ids, {key: taken(x) for key, x in self.targets.items()})

    @staticmethod
    def joined(parts: list[Batch]) -> Batch:
        """Return the samples of several batches of the same layers, one after the other."""
        rows = {name: torch.cat([part.rows[name] for part in parts], -2) for name in parts[0].rows}
        targets = {key: torch.cat([part.targets[key] for part in parts], -2) for key in parts[0].targets}
        return Batch(rows, torch.cat([part.ids for part in parts]), targets)
