"""What all estimators that multiply the kernel matrices of two layers have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import PairEstimator
from tdprobe.stats.joint_entropy import JointEntropy, JointEntropyTable
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

LEAST = 2


class KernelPairEstimator(PairEstimator):
    """Score pairs of layers by the entropies of their kernel matrices and of the products of those.

    Estimators of the same kernel and order share all of them.

    Args:
        keys: Keys of ``(*lead, n, d_a)`` and ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        config: Kernel and order.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
    """

    def __init__(self, keys: tuple[Any, Any], out_key: Any, config: JointEntropy, bank_size: int) -> None:
        super().__init__(keys, [out_key])
        Reservoir(bank_size)
        self.in_key_a, self.in_key_b = keys
        self.out_key, self.bank_size = out_key, bank_size
        self.alpha, self.kernel, self.bandwidth = config.alpha, config.kernel, config.bandwidth
        self.center, self.normalize_rows = config.center, config.normalize_rows
        self._config = config

    @abstractmethod
    def _value(self, table: JointEntropyTable) -> Float[Tensor, "*lead l l"]:
        """Compute the scores from the entropies."""

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def derivation(self, state: Any) -> JointEntropy:
        """Ask for the entropies of all pairs."""
        return self._config

    def score(self, state: Any) -> TensorDict:
        """Score all pairs of layers.

        Args:
            state: `ReservoirState` or `JointEntropyTable`.

        Returns:
            ``"score"``, ``(*lead, l, l)`` float64, NaN for layers that do not vary or are not finite; ``"finite"``.

        Raises:
            ConfigError: Fewer than 2 rows.
        """
        if int(state.n) < LEAST:
            raise ConfigError(f"got {int(state.n)} rows; {self.spec.name} needs at least {LEAST} samples")
        table = state if isinstance(state, JointEntropyTable) else self._config(state)
        return TensorDict({"score": self._value(table), "finite": table.finite})


def mutual_information(table: JointEntropyTable) -> Float[Tensor, "*lead l l"]:
    """Compute ``S(A) + S(B) - S(A, B)``."""
    return table.own.unsqueeze(-1) + table.own.unsqueeze(-2) - table.joint
