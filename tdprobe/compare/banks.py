"""Rows of checkpoints that are never in memory together: the same sampled rows of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from tdprobe.compare.parts import Part
from tdprobe.compare.rows import joint_name
from tdprobe.errors import ConfigError
from tdprobe.stats.reservoir import Reservoir, ReservoirState
from tdprobe.stats.state import layer_list
from tdprobe.stream.batch import Batch
from tdprobe.stream.buffer import require_same_layers


class Bank:
    """Keep a bounded sample of the rows of one checkpoint; which rows stay depends on their ids alone.

    Args:
        size: Most rows.
    """

    def __init__(self, size: int) -> None:
        self._reservoir = Reservoir(size=size)
        self._open: ReservoirState | None = None
        self._done: ReservoirState | None = None
        self._lowest = self._reservoir.init(
            [torch.zeros(0, 0, device="cpu")], torch.zeros(0, dtype=torch.int64, device="cpu")
        )
        self.layers: tuple[str, ...] = ()

    @property
    def state(self) -> ReservoirState | None:
        """The sample, if any row has come."""
        if self._open is None or self._done is None:
            return self._done if self._open is None else self._open
        return self._done.merge(self._open)

    def push(self, batch: Batch) -> None:
        """Offer the rows of one batch.

        Raises:
            ConfigError: A layer did not run, or gave rows of another width.
        """
        known = self._done if self._open is None else self._open
        if known is not None:
            require_same_layers(batch_of(self.layers, known), batch)
        self.layers = self.layers or tuple(batch.rows)
        rows = [batch.rows[layer] for layer in self.layers]
        state = self._reservoir.init(rows, batch.ids) if self._open is None else self._open
        self._open = self._reservoir.update(state, rows, batch.ids)

    def take(self) -> Part:
        """End the open unit of work and return its rows, without those that units before it have ruled out."""
        state, self._open = self._open, None
        if state is None:
            return Part(counts={"rows": 0})
        # Ids alone tell which rows are still among the lowest, so that parts shrink as there are more of them.
        ids = state.ids.cpu()
        self._lowest = self._reservoir.update(self._lowest, [torch.zeros(len(ids), 0, device="cpu")], ids)
        state = state.keep(torch.isin(ids, self._lowest.ids).nonzero().squeeze(-1))
        widths = [rows.shape[-1] for rows in layer_list(state.rows)]
        return Part(dict(zip(self.layers, widths, strict=True)), {"rows": int(state.n_seen)}, ((state,),))

    def add(self, part: Part) -> None:
        """Keep the rows of units that were taken."""
        if part.states:
            self.put(tuple(part.widths), cast("ReservoirState", part.states[0][0]))

    def put(self, layers: Sequence[str], state: ReservoirState) -> None:
        """Keep a sample."""
        self.layers = tuple(layers)
        self._done = state if self._done is None else self._done.merge(state)


class Banks:
    """Keep a bank for each checkpoint.

    Args:
        size: Most rows of each.
    """

    def __init__(self, size: int) -> None:
        self.size = Reservoir(size=size).size
        self._banks: dict[str, Bank] = defaultdict(partial(Bank, size))

    def __getitem__(self, name: str) -> Bank:
        """Return the bank of a checkpoint."""
        return self._banks[name]

    @property
    def sampled(self) -> bool:
        """Whether any checkpoint has rows, without which there is nothing to join."""
        return bool(self._batches())

    @property
    def n(self) -> int:
        """Rows that every checkpoint has, of those that have any."""
        kept = [set(batch.ids.tolist()) for batch in self._batches().values()]
        return len(set.intersection(*kept)) if kept else 0

    def joined(self) -> tuple[Batch, int]:
        """Put the common rows of all checkpoints side by side.

        Returns:
            The rows of all layers, in one order and on one device, and the number of rows left out.

        Raises:
            ConfigError: No row is common.
        """
        batches = self._batches()
        sizes = {name: batch.n for name, batch in batches.items()}
        ids = torch.tensor(
            sorted(set.intersection(*(set(batch.ids.tolist()) for batch in batches.values()))),
            dtype=torch.int64,
            device="cpu",
        )
        if not len(ids):
            counts = ", ".join(f"{name!r}: {size}" for name, size in sizes.items())
            raise ConfigError(
                f"the checkpoints give rows of different tokens (rows {counts}), so there is nothing to pair; "
                "compare one row per text: tokens='last' or tokens='mean'"
            )
        rows: dict[str, Tensor] = {}
        for name, batch in batches.items():
            take = batch.ids.argsort()[torch.searchsorted(batch.ids.sort().values, ids.to(batch.ids.device))]
            for layer, values in batch.rows.items():
                device = next(iter(rows.values()), values).device
                rows[joint_name(name, layer)] = values.index_select(0, take.to(values.device)).to(device)
        return Batch(rows, ids), max(sizes.values()) - len(ids)

    def _batches(self) -> dict[str, Batch]:
        states: dict[str, Any] = {name: bank.state for name, bank in self._banks.items()}
        return {name: batch_of(self[name].layers, state) for name, state in states.items() if state is not None}


def batch_of(layers: Sequence[str], state: ReservoirState) -> Batch:
    """Return the rows of a sample by the names of their layers."""
    return Batch(dict(zip(layers, layer_list(state.rows), strict=True)), state.ids)
