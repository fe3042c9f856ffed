"""What estimators of dimension from neighbours share: their keys, the bank, and rows that count once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Bool, Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import LayerEstimator
from tdprobe.registry import Mode, check_mode
from tdprobe.stats.neighbors import NeighborTable
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

# Standard errors over those of independent points: points that are each other's neighbours see the same distances,
# which makes estimates spread 1.2 to 1.7 times as much on uniform samples. The slope of twonn adds 1.1 of its own.
SPREAD = 1.5


class NeighborDimension(LayerEstimator):
    """Estimate the dimension of a layer from a bank of rows, of which those that are equal count once."""

    def __init__(self, in_key: Any, out_keys: Sequence[Any], *, bank_size: int, mode: Mode) -> None:
        super().__init__([in_key], out_keys)
        self.in_key, self.out_key = in_key, out_keys[0]
        self.bank_size, self.mode = bank_size, check_mode(mode)

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def _require(self, state: Any, least: int, why: str) -> None:
        n = int(state.n)
        if n < least:
            raise ConfigError(f"got {n} rows; {self.spec.name} with {why} needs at least {least} points")

    def _scores(self, table: NeighborTable, **found: Tensor) -> TensorDict:
        return TensorDict({**found, "duplicates": table.duplicates, "finite": table.finite})


def counted(table: NeighborTable, rank: int) -> Bool[Tensor, "*lead l m"]:
    """Tell which rows count: they repeat no earlier one, and have a neighbour of this rank."""
    return ~table.repeated & table.at(rank).isfinite()


def median(values: Float[Tensor, "*lead m"]) -> Float[Tensor, "*lead"]:
    """Return the median of what is not NaN: of an even number of values, the mean of the two in the middle."""
    ascending, count = values.sort(-1).values, (~values.isnan()).sum(-1, keepdim=True)
    middle = torch.cat([(count - 1).clamp(min=0) // 2, (count // 2).clamp(max=values.shape[-1] - 1)], -1)
    return ascending.gather(-1, middle).mean(-1)


def suffixed(key: Any, end: str) -> Any:
    """Append to a key, or to the last part of a nested one."""
    return key + end if isinstance(key, str) else (*key[:-1], key[-1] + end)
