"""A bounded sample of rows that is the same in every layer, checkpoint and rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.errors import ConfigError
from tdprobe.stats.hashing import mix64
from tdprobe.stats.state import (
    State,
    Statistic,
    by_layer,
    check_widths,
    layer_list,
    undisturbed,
    working_dtype,
)

# A bank is never made smaller than this to save memory.
FEWEST = 512


def _order(ids: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    # Both steps are one to one, so different ids never tie.
    return mix64(ids ^ mix64(torch.tensor(seed, device=ids.device)))


class _Picks:
    """Say which of ``count`` rows and of more that follow are kept; looked up once for all layers on a device."""

    def __init__(self, kept: Int[Tensor, " m"], count: int) -> None:
        slots = (kept >= count).nonzero().squeeze(-1)
        self.count = count
        self._places: dict[torch.device, tuple[Tensor, ...]] = {
            kept.device: (kept.clamp(max=max(0, count - 1)), slots, kept[slots] - count)
        }

    def of(self, own: Float[Tensor, "*lead m d"], new: Tensor) -> Tensor:
        """Return the kept rows of ``own`` followed by ``new``, without copying the two into one first."""
        known = self._places
        if own.device not in known:
            known[own.device] = tuple(x.to(own.device) for x in next(iter(known.values())))
        old, slots, fresh = known[own.device]
        if self.count == 0:
            return new.index_select(-2, fresh)
        picked = own.index_select(-2, old)
        return picked.index_copy_(-2, slots, new.index_select(-2, fresh).to(own.dtype))


class ReservoirState(State):
    """Hold the rows whose ids hash lowest, in the order of their hashes.

    Attributes:
        ids: Ids of the kept rows, ``(m,)`` int64, each once.
        rows: Layer index (``"0"``, ``"1"``, ...) -> ``(*lead, m, d)`` in the dtype of the stream.
        n_seen: Rows that went past, repeated ids included, int64.
        capacity: Most rows to keep, int64.
        seed: Seed of the hash, int64.
    """

    ids: Tensor
    rows: TensorDict
    n_seen: Tensor
    capacity: Tensor
    seed: Tensor

    @property
    def n(self) -> Tensor:
        """Count the kept rows, int64."""
        return torch.tensor(self.ids.shape[0], device="cpu")

    def merge(self, other: ReservoirState) -> ReservoirState:
        """Keep the lowest hashes of both; bitwise the same in any order and grouping."""
        if int(self.capacity) != int(other.capacity) or int(self.seed) != int(other.seed):
            raise ConfigError(
                f"cannot merge reservoirs of size {int(self.capacity)}, seed {int(self.seed)} and size "
                f"{int(other.capacity)}, seed {int(other.seed)}; use the same Reservoir(size, seed) for both"
            )
        theirs = layer_list(other.rows)
        check_widths(theirs, self._shapes())
        return self._with(other.ids, theirs, other.n_seen)

    def keep(self, index: Int[Tensor, " k"]) -> ReservoirState:
        """Return the sample with some of its rows only, which have all been seen nevertheless."""
        rows = by_layer(x.index_select(-2, index.to(x.device)) for x in layer_list(self.rows))
        return self._replaced(self.ids[index.to(self.ids.device)], rows, 0)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [(*x.shape[:-2], x.shape[-1]) for x in layer_list(self.rows)]

    def _with(self, ids: Tensor, rows: Sequence[Tensor], seen: Tensor | int) -> ReservoirState:
        joint = torch.cat([self.ids, ids.to(self.ids.device)])
        hashes, order = _order(joint, int(self.seed)).sort(stable=True)
        # Equal hashes are equal ids; the stable sort puts the row that is already here first.
        fresh = torch.ones_like(hashes, dtype=torch.bool)
        fresh[1:] = hashes[1:] != hashes[:-1]
        kept = order[fresh][: int(self.capacity)]
        picks, both = _Picks(kept, len(self.ids)), zip(layer_list(self.rows), rows, strict=True)
        return self._replaced(joint[kept], by_layer(picks.of(own, x) for own, x in both), seen)

    def _replaced(self, ids: Tensor, rows: TensorDict, seen: Tensor | int) -> ReservoirState:
        seen = self.n_seen + seen
        return ReservoirState(ids=ids, rows=rows, n_seen=seen, capacity=self.capacity, seed=self.seed)


@dataclass(frozen=True)
class Reservoir(Statistic):
    """Keep the ``size`` rows whose sample ids hash lowest (bottom-k sampling).

    Which rows stay depends on ids and seed alone, so every layer, checkpoint and rank keeps the same samples.
    Equal ids mean the same sample: of repeated ids the first row stays.

    Args:
        size: Most rows to keep, 1 or more.
        seed: Another seed draws another sample.

    Example:
        >>> x, ids = torch.randn(100, 3), torch.arange(100)
        >>> reservoir = Reservoir(size=8)
        >>> state = reservoir.update(reservoir.init([x], ids), [x], ids)
        >>> torch.equal(state.rows["0"], x[state.ids]), int(state.n_seen)
        (True, 100)

    References:
        Cohen, Kaplan 2007, Summarizing data using bottom-k sketches.
    """

    name: ClassVar[str] = "reservoir"
    additive: ClassVar[bool] = False
    size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a size that keeps nothing."""
        if self.size < 1:
            raise ConfigError(f"got size={self.size}; allowed are integers from 1 on")

    @property
    def route(self) -> str:
        """Say how many rows at most."""
        return f"bank of {self.size} rows"

    def nbytes(self, widths: Sequence[int], data_sets: int = 1) -> int:
        """Return the size of a full bank of float32 in bytes."""
        return self.size * (8 + 4 * data_sets * sum(widths))

    def cheaper(self) -> Reservoir | None:
        """Keep half of the rows, down to a number that neighbours need."""
        return replace(self, size=self.size // 2) if self.size >= 2 * FEWEST else None

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> ReservoirState:
        """Return an empty sample for the layers of ``rows``."""
        working_dtype(rows)
        device = ids.device
        return ReservoirState(
            ids=ids[:0].clone(),
            rows=by_layer(x.detach()[..., :0, :].clone() for x in rows),
            n_seen=torch.zeros((), dtype=torch.int64, device=device),
            capacity=torch.tensor(self.size, device=device),
            seed=torch.tensor(self.seed, device=device),
        )

    @undisturbed
    def update(self, state: ReservoirState, rows: Sequence[Tensor], ids: Tensor) -> ReservoirState:
        """Let the rows in whose hashes are low enough; nothing is copied when none is."""
        check_widths(rows, state._shapes())
        # Streams keep ids on the CPU; those of a state that was moved as a whole are elsewhere.
        ids = ids.to(state.ids.device)
        enters = ~torch.isin(ids, state.ids)
        if len(state.ids) == self.size:
            enters &= _order(ids, self.seed) < _order(state.ids[-1:], self.seed)
        index = enters.nonzero().squeeze(-1)
        if len(index) == 0:
            return state._replaced(state.ids, state.rows, len(ids))
        some = {device: index.to(device) for device in {x.device for x in rows}}
        return state._with(ids[index], [x.index_select(-2, some[x.device]) for x in rows], len(ids))
