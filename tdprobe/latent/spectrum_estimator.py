"""What all estimators that read the spectrum of a layer have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import LayerEstimator
from tdprobe.stats.moments import Moments
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.spectrum import Spectrum, SpectrumTable, as_spectrum
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch


class SpectrumEstimator(LayerEstimator):
    """Score each layer by the eigenvalues of ``X'X``, which are those of the Gram matrix ``XX'``.

    A stream keeps the second moments, so its score is exact whatever the batches were; a one-shot call of fewer rows
    than columns goes by the smaller Gram matrix. Estimators that look at the same matrix share its eigenvalues.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        center: Subtract the column means.
        normalize_rows: Divide each row by its length, before centring.
    """

    def __init__(self, in_key: Any, out_key: Any, center: bool, normalize_rows: bool) -> None:
        super().__init__([in_key], [out_key])
        for name, value in (("center", center), ("normalize_rows", normalize_rows)):
            if not isinstance(value, bool):
                raise ConfigError(f"got {name}={value!r}; allowed are True and False")
        self.in_key, self.out_key, self.center, self.normalize_rows = in_key, out_key, center, normalize_rows

    @abstractmethod
    def _value(self, table: SpectrumTable) -> Float[Tensor, "*lead l"]:
        """Compute the score from a spectrum."""

    def statistic(self) -> Statistic:
        """Return `Moments`, of unit rows with ``normalize_rows``."""
        return Moments(self.normalize_rows)

    def _one_shot(self, batch: Batch) -> Statistic:
        wide = 0 < batch.n < max(x.shape[-1] for x in batch.rows.values())
        return Reservoir(batch.n) if wide else self.statistic()

    def derivation(self, state: Any) -> Spectrum:
        """Ask for the eigenvalues."""
        return Spectrum(self.center, self.normalize_rows)

    def score(self, state: Any) -> TensorDict:
        """Score each layer.

        Args:
            state: `MomentsState`, `ReservoirState` or `SpectrumTable`.

        Returns:
            ``"score"``, ``(*lead, l)`` float64, NaN for layers that do not vary (without centring: that are zero) or
            are not finite; ``"finite"``.

        Raises:
            ConfigError: No rows, or a single one with ``center``.
        """
        n, least = int(state.n), 1 + self.center
        if n < least:
            rows = f"{least} rows" if self.center else "1 row"
            raise ConfigError(f"got {n} rows; {self.spec.name} with center={self.center} needs at least {rows}")
        table = as_spectrum(state, self.derivation(state))
        return TensorDict({"score": self._value(table), "finite": table.finite})
