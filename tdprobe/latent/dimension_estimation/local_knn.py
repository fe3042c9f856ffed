"""Intrinsic dimension around each point, from the growth of its neighbourhood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.estimator import LayerEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats.neighbors import Neighbors, as_neighbors
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch


@register(
    Spec(
        name="local_knn",
        kind="layer",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer, for a bank of n rows",
        reference="Farahmand, Szepesvari, Audibert 2007, Manifold-adaptive dimension estimation",
        streaming={"distinct": True},
    )
)
class LocalKnnDimensionEstimator(LayerEstimator):
    """Estimate the dimension around each point from the distances to its k-th and 2k-th neighbour.

    ``d(x) = log 2 / log(R_2k / R_k)``: twice the neighbours are found in a ball of ``2^(1/d)`` times the radius.
    NaN where the two distances are equal, or where there are fewer than 2k neighbours.

    A one-shot call writes the value of each point. The score of a layer is their median, because it is not biased:
    for locally constant density ``(R_k / R_2k)^d`` is Beta(k, k) distributed, and the median of that is one half.

    Args:
        k: Neighbours, 2 or more; ``"auto"`` takes ``sqrt(n)``, at least 2 and at most ``(n - 1) / 2``.
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead, n)`` float32.
        eps: Distance up to which rows count as the same; not used with ``distinct``.
        distinct: Count rows that are equal once.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        TypeError: ``k`` is neither an integer nor ``"auto"``.
        ConfigError: ``k`` is 1 or less, ``eps`` negative, or a key bad.

    Example:
        >>> square = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> td = LocalKnnDimensionEstimator(k=10)(TensorDict({"data": square}))
        >>> td["dimension"].shape, abs(float(td["dimension"].median()) - 2) < 0.2
        (torch.Size([2000]), True)

    References:
        Farahmand, Szepesvari, Audibert 2007, Manifold-adaptive dimension estimation.
    """

    def __init__(
        self,
        k: int | Literal["auto"] = "auto",
        in_key: Any = "data",
        out_key: Any = "dimension",
        eps: float = 1e-5,
        *,
        distinct: bool = False,
        bank_size: int = 4096,
    ) -> None:
        super().__init__([in_key], [out_key])
        if k != "auto" and not isinstance(k, int):
            raise TypeError(f"got k={k!r}; k must be an integer from 2 on, or 'auto'")
        if k != "auto" and k <= 1:
            raise ConfigError(f"got k={k!r}; k must be greater than 1")
        if not eps >= 0:
            raise ConfigError(f"got eps={eps!r}; allowed are distances from 0 on")
        self.k, self.in_key, self.out_key, self.eps = k, in_key, out_key, eps
        self.distinct, self.bank_size = distinct, bank_size

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def _neighbours(self, n: int) -> int:
        k = max(2, min(math.isqrt(n), (n - 1) // 2)) if self.k == "auto" else self.k
        if n < 2 * k + 1:
            raise ConfigError(f"got {n} rows; local_knn with k={k} needs at least 2k+1 = {2 * k + 1} points")
        return k

    def derivation(self, state: Any) -> Neighbors:
        """Ask for the k-th and the 2k-th neighbour.

        Raises:
            ConfigError: Fewer than 2k + 1 rows.
        """
        k = self._neighbours(int(state.n))
        return Neighbors((k, 2 * k), distinct=self.distinct, beyond=0.0 if self.distinct else self.eps)

    def score(self, state: Any) -> TensorDict:
        """Estimate the dimension around each row of each layer.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"``, the median over rows, ``(*lead, l)``, and ``"pointwise"``, ``(*lead, l, n)`` in the order
            of the sample ids, float64; ``"duplicates"`` and ``"finite"``.

        Raises:
            ConfigError: Fewer than 2k + 1 rows.
        """
        table = as_neighbors(state, self.derivation(state))
        k = self._neighbours(int(table.n))
        inner, outer = table.at(k), table.at(2 * k)
        values = math.log(2) / (outer / inner).log()
        values = torch.where(outer < torch.inf, values, torch.nan)
        counted = values.masked_fill(table.repeated, torch.nan) if self.distinct else values
        # A point whose two distances are equal is infinitely dimensional: NaN by itself, but it has a place.
        score = counted.nanmedian(-1).values
        pointwise = values.masked_fill(values.isinf(), torch.nan)[..., table.ids.argsort()]
        facts = {"duplicates": table.duplicates, "finite": table.finite}
        return TensorDict({"score": score, "pointwise": pointwise, **facts})

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["pointwise"][..., 0, :]]
