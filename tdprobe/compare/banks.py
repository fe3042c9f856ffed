"""Rows of checkpoints that are never in memory together: the same sampled rows of each."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe.compare.rows import joint_name
from tdprobe.errors import ConfigError, StateError
from tdprobe.stats.reservoir import Reservoir, ReservoirState
from tdprobe.stats.state import layer_list
from tdprobe.stream.batch import Batch
from tdprobe.stream.buffer import require_same_layers


class Banks:
    """Keep a bounded sample of rows for each checkpoint; which rows stay depends on their ids alone.

    Args:
        size: Most rows of each checkpoint.
    """

    def __init__(self, size: int) -> None:
        self._reservoir = Reservoir(size=size)
        self._layers: dict[str, tuple[str, ...]] = {}
        self._states: dict[str, ReservoirState] = {}

    def add(self, name: str, batch: Batch) -> None:
        """Offer the rows of one batch of a checkpoint.

        Raises:
            ConfigError: A layer did not run, or gave rows of another width.
        """
        if name in self._states:
            require_same_layers(self._batch(name), batch)
        layers = self._layers.setdefault(name, tuple(batch.rows))
        rows = [batch.rows[layer] for layer in layers]
        state = self._states[name] if name in self._states else self._reservoir.init(rows, batch.ids)
        self._states[name] = self._reservoir.update(state, rows, batch.ids)

    @property
    def n(self) -> int:
        """Rows that every checkpoint has, of those that have any."""
        return len(self._common())

    def joined(self) -> tuple[Batch, int]:
        """Put the common rows of all checkpoints side by side.

        Returns:
            The rows of all layers, in one order and on one device, and the number of rows left out.

        Raises:
            StateError: There are no rows.
            ConfigError: No row is common.
        """
        if not self._states:
            raise StateError(
                "no row has been scored yet: run the comparison first, on texts with tokens that tokens= and "
                "skip_first= leave to be scored"
            )
        sizes = {name: int(state.ids.numel()) for name, state in self._states.items()}
        ids = torch.tensor(sorted(self._common()), dtype=torch.int64)
        if not len(ids):
            counts = ", ".join(f"{name!r}: {size}" for name, size in sizes.items())
            raise ConfigError(
                f"the checkpoints give rows of different tokens (rows {counts}), so there is nothing to pair; "
                "compare one row per text: tokens='last' or tokens='mean'"
            )
        rows: dict[str, Tensor] = {}
        for name in self._states:
            batch = self._batch(name)
            take = batch.ids.argsort()[torch.searchsorted(batch.ids.sort().values, ids)]
            for layer, values in batch.rows.items():
                device = next(iter(rows.values()), values).device
                rows[joint_name(name, layer)] = values.index_select(0, take.to(values.device)).to(device)
        return Batch(rows, ids), max(sizes.values()) - len(ids)

    def _batch(self, name: str) -> Batch:
        state = self._states[name]
        return Batch(dict(zip(self._layers[name], layer_list(state.rows), strict=True)), state.ids)

    def _common(self) -> set[int]:
        kept = [set(state.ids.tolist()) for state in self._states.values()]
        return set.intersection(*kept) if kept else set()
