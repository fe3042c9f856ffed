"""What all comparisons of nearest neighbours share: their keys, the table they read, and the mean over rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError, unknown
from tdprobe.estimator import PairEstimator
from tdprobe.registry import Mode, check_mode
from tdprobe.stats.neighborhoods import Neighborhoods, mean_terms
from tdprobe.stats.neighbors import Neighbors, as_neighbors
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

Metric = Literal["euclidean", "cosine"]


class NeighborhoodEstimator(PairEstimator):
    """Compare, row by row, the k nearest neighbours in one layer with those in another.

    All rows count, so rows equal to a row are its nearest neighbours. Where more rows are tied than there are places
    left, each of them is in by an equal share (`Neighborhoods`); the order of rows never matters. A layer with NaN or
    infinite values scores NaN.
    """

    def __init__(
        self, keys: Sequence[Any], out_key: Any, k: int, metric: Metric, *, bank_size: int, mode: Mode
    ) -> None:
        super().__init__(keys, [out_key])
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"got k={k!r}; allowed are integers from 1 on, such as 10")
        if metric not in get_args(Metric):
            raise ConfigError(unknown("metric", metric, get_args(Metric)))
        self.in_key_a, self.in_key_b = keys
        self.out_key, self.k, self.metric = out_key, k, metric
        self.bank_size, self.mode = bank_size, check_mode(mode)

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def derivation(self, state: Any) -> Neighbors:
        """Ask for the k nearest rows, and for the distance of the next, which may be tied with the last."""
        return Neighbors(tuple(range(1, self.k + 2)), places=self.k, directions=self.metric == "cosine")

    def score(self, state: Any) -> TensorDict:
        """Compare all layer pairs.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"`` and its standard error over rows ``"se"``, ``(*lead, l, l)`` float64; ``"duplicates"`` and
            ``"finite"``.

        Raises:
            ConfigError: Fewer than k + 2 rows.
        """
        n = int(state.n)
        if n < self.k + 2:
            raise ConfigError(
                f"got {n} rows; {self.spec.name} with k={self.k} needs at least k+2 = {self.k + 2} samples"
            )
        table = as_neighbors(state, self.derivation(state))
        score, se = self._scaled(*mean_terms(table, self.k, self._terms), n)
        return TensorDict({"score": score, "se": se, "duplicates": table.duplicates, "finite": table.finite})

    def _scaled(self, score: Tensor, se: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Bring mean terms to the scale of the score."""
        return score, se

    @abstractmethod
    def _terms(self, hoods: Neighborhoods, data: list[Tensor]) -> Float[Tensor, "r l l"]:
        """Compare the neighbourhoods of some rows between all layers.

        Args:
            hoods: The neighbourhoods.
            data: All rows of each layer, ``(n, d)``.
        """
