"""Intrinsic dimension around each point, from the growth of its neighbourhood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.latent.dimension_estimation.neighbor_dimension import SPREAD, NeighborDimension, median
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighbors import Neighbors, as_neighbors


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
    )
)
class LocalKnnDimensionEstimator(NeighborDimension):
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
        distinct: Count rows that are equal once; by default with ``mode="robust"`` only.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``, which counts equal rows once.

    Raises:
        TypeError: ``k`` is neither an integer nor ``"auto"``.
        ConfigError: ``k`` is 1 or less, ``eps`` negative, or a key or mode bad.

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
        distinct: bool | None = None,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        super().__init__(in_key, [out_key], bank_size=bank_size, mode=mode)
        if k != "auto" and not isinstance(k, int):
            raise TypeError(f"got k={k!r}; k must be an integer from 2 on, or 'auto'")
        if k != "auto" and k <= 1:
            raise ConfigError(f"got k={k!r}; k must be greater than 1")
        if not eps >= 0:
            raise ConfigError(f"got eps={eps!r}; allowed are distances from 0 on")
        self.k, self.eps, self.distinct = k, eps, distinct

    @property
    def _distinct(self) -> bool:
        return self.mode == "robust" if self.distinct is None else self.distinct

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
        return Neighbors((k, 2 * k), distinct=self._distinct, beyond=0.0 if self._distinct else self.eps)

    def score(self, state: Any) -> TensorDict:
        """Estimate the dimension around each row of each layer.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"``, the median over rows, and its standard error ``"se"``, ``(*lead, l)``: 1.5 times that of the
            median of independent points, ``sqrt(pi / 2 / (2 k + 1)) d / (log 2 sqrt(n))``; ``"pointwise"``,
            ``(*lead, l, n)`` in the order of the sample ids, float64; ``"duplicates"`` and ``"finite"``.

        Raises:
            ConfigError: Fewer than 2k + 1 rows.
        """
        table = as_neighbors(state, self.derivation(state))
        k = self._neighbours(int(table.n))
        inner, outer = table.at(k), table.at(2 * k)
        values = math.log(2) / (outer / inner).log()
        values = torch.where(outer < torch.inf, values, torch.nan)
        counted = values.masked_fill(table.repeated, torch.nan) if self._distinct else values
        # A point whose two distances are equal is infinitely dimensional: NaN by itself, but it has a place.
        score = median(counted)
        pointwise = values.masked_fill(values.isinf(), torch.nan)[..., table.ids.argsort()]
        points = (~counted.isnan()).sum(-1).double()
        se = SPREAD * math.sqrt(math.pi / 2 / (2 * k + 1)) / math.log(2) * score / points.sqrt()
        return self._scores(table, score=score, se=se, pointwise=pointwise)

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["pointwise"][..., 0, :]]
