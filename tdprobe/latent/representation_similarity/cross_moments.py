"""What the measures of cross-covariances have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.estimator import PairEstimator
from tdprobe.registry import Mode, check_mode
from tdprobe.stats.cross import Cross
from tdprobe.stats.cross_state import CrossState
from tdprobe.stats.spectra import PairMeasure, PairMeasures, PairTable
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

LEAST = 2


class CrossMomentsEstimator(PairEstimator):
    """Measure layer pairs by their covariances; a measure says what to make of them in `measure`.

    Args:
        keys: Two keys to read and one to write.
        sketch: Columns to keep of wider layers, see `Cross`.
        mode: ``"strict"`` or ``"robust"``.
    """

    # Whether turning the columns of a layer never matters, so that wide layers may be replaced by narrower ones.
    turnable: ClassVar[bool] = True

    def __init__(self, keys: tuple[Any, Any, Any], sketch: int | None, mode: Mode) -> None:
        super().__init__(keys[:2], keys[2:])
        self.in_key_a, self.in_key_b, self.out_key = keys
        self.sketch, self.mode = sketch, check_mode(mode)
        Cross(sketch=sketch)

    @abstractmethod
    def measure(self) -> PairMeasure:
        """Return the formula."""

    def statistic(self) -> Statistic:
        """Return `Cross`."""
        return Cross(sketch=self.sketch)

    def _one_shot(self, batch: Batch) -> Statistic:
        wide = any(x.shape[-1] > batch.n for x in batch.rows.values())
        return _Narrowed() if wide and self.turnable and self.sketch is None else self.statistic()

    def derivation(self, state: Any) -> PairMeasures:
        """Ask for the measure of all pairs; all measures share the axes of the layers."""
        return PairMeasures((self.measure(),))

    def score(self, state: Any) -> TensorDict:
        """Measure all layer pairs.

        Args:
            state: `CrossState` or `PairTable`.

        Returns:
            ``"score"``, ``(*lead, l, l)`` float64, from the layer of the row to that of the column, NaN for layers
            without variance; ``"finite"``.

        Raises:
            ConfigError: Fewer than 2 rows.
        """
        if int(state.n) < LEAST:
            raise ConfigError(f"got {int(state.n)} rows; {self.spec.name} needs at least {LEAST}")
        table: PairTable = state if isinstance(state, PairTable) else self.derivation(state)(state)
        return TensorDict({"score": table.values[self.measure()], "finite": table.finite})


@dataclass(frozen=True)
class _Narrowed(Statistic):
    """Keep cross products of all rows at once, where layers with more columns than rows are turned to be square."""

    name: ClassVar[str] = "cross"

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> CrossState:
        n = rows[0].shape[-2]
        return Cross().init([x[..., : min(n, x.shape[-1])] for x in rows], ids)

    def update(self, state: CrossState, rows: Sequence[Tensor], ids: Tensor) -> CrossState:
        with torch.inference_mode(False), torch.no_grad():
            turned = [x if x.shape[-1] <= x.shape[-2] else _square(x) for x in rows]
            return Cross().update(state, turned, ids)


def _square(x: Tensor) -> Tensor:
    """Turn columns onto the span of the rows: with ``x' = Q R``, the rows of ``R'`` have the products of those of x."""
    return torch.linalg.qr(x.detach().double().mT, mode="r").R.mT


def require_share(name: str, value: float, what: str) -> None:
    """Refuse anything outside of (0, 1].

    Raises:
        ConfigError: It is.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"got {name}={value!r}; allowed are {what} above 0, up to 1")


def require_ridge(ridge: float) -> None:
    """Refuse a ridge below 0.

    Raises:
        ConfigError: It is.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not ridge >= 0:
        raise ConfigError(f"got ridge={ridge!r}; allowed are numbers from 0 on, relative to the total variance")
