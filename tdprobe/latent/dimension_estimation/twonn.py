"""Intrinsic dimension from the two nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import LayerEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats.neighbors import Neighbors, as_neighbors
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

LEAST = 3
# Spread of the slope in units of d / sqrt(n). For independent mu it is 1.1 (sqrt(5)/2; 1.08 without the largest tenth);
# points that are each other's neighbours are not independent, which makes it 1.2 to 1.7 on uniform samples.
SPREAD = 1.5


@register(
    Spec(
        name="twonn",
        kind="layer",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer, for a bank of n rows",
        reference="Facco et al. 2017, Estimating the intrinsic dimension by a minimal neighborhood information",
        streaming={"discard": 0.1, "distinct": True},
    )
)
class TwoNnDimensionEstimator(LayerEstimator):
    """Estimate the intrinsic dimension from the distances to the first and second neighbour.

    For points of locally constant density ``mu = r_2 / r_1`` has ``P(mu < x) = 1 - x^-d``. With ``mu_i`` the
    i-th smallest of n, ``d`` is the slope through the origin of ``-log(1 - i / n)`` over ``log mu_i``; the largest,
    for which that is infinite, is left out.

    By default neighbours up to a distance of ``eps`` do not count. That threshold is absolute, as in the original
    convention; ``distinct=True`` instead counts rows that are equal once, at any scale. The value is NaN where all
    ``mu`` are 1, as on a lattice, and where a value is not finite.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        return_xy: Also write the points of the line, ``(*lead, n - 1)`` float32 padded with NaN, under the out key
            followed by ``_x`` and ``_y``.
        eps: Distance up to which rows count as the same; not used with ``distinct``.
        discard: Share of the largest ``mu`` to leave out of the fit, where the density is least constant.
        distinct: Count rows that are equal once.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, a negative ``eps``, or a ``discard`` outside [0, 1).

    Example:
        >>> square = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> td = TwoNnDimensionEstimator(discard=0.1)(TensorDict({"data": square}))
        >>> abs(float(td["dimension"]) - 2) < 0.2
        True

    References:
        Facco, d'Errico, Rodriguez, Laio 2017, Estimating the intrinsic dimension of datasets by a minimal
        neighborhood information.
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "dimension",
        return_xy: bool = False,
        eps: float = 1e-5,
        *,
        discard: float = 0.0,
        distinct: bool = False,
        bank_size: int = 4096,
    ) -> None:
        super().__init__([in_key], [out_key])
        if not eps >= 0:
            raise ConfigError(f"got eps={eps!r}; allowed are distances from 0 on")
        if not 0 <= discard < 1:
            raise ConfigError(f"got discard={discard!r}; allowed are shares from 0 to below 1, such as 0.1")
        if return_xy:
            self.out_keys = [out_key, *(_suffixed(out_key, end) for end in ("_x", "_y"))]
        self.in_key, self.out_key, self.return_xy, self.eps = in_key, out_key, return_xy, eps
        self.discard, self.distinct, self.bank_size = discard, distinct, bank_size

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def derivation(self, state: Any) -> Neighbors:
        """Ask for the first two neighbours."""
        return Neighbors((1, 2), distinct=self.distinct, beyond=0.0 if self.distinct else self.eps)

    def score(self, state: Any) -> TensorDict:
        """Estimate the dimension of each layer.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"`` and its standard error ``"se"``, ``1.5 d / sqrt(points of the fit)``, ``(*lead, l)``
            float64; ``"x"`` and ``"y"``, ``(*lead, l, n - 1)``; ``"valid"``, rows with two neighbours;
            ``"duplicates"`` and ``"finite"``. A layer with fewer than 3 valid rows scores NaN.

        Raises:
            ConfigError: Fewer than 3 rows.
        """
        table = as_neighbors(state, self.derivation(state))
        if int(table.n) < LEAST:
            raise ConfigError(f"got {int(table.n)} rows; twonn needs at least {LEAST} points")
        first, second = table.at(1), table.at(2)
        valid = (first > 0) & (second < torch.inf)
        if self.distinct:
            valid &= ~table.repeated
        x, y, used = self._line(torch.where(valid, (second / first).log(), torch.inf), valid.sum(-1, keepdim=True))
        score = (x * y).nansum(-1) / x.square().nansum(-1)
        score = torch.where(valid.sum(-1) >= LEAST, score, torch.nan)
        scores = {"score": score, "se": SPREAD * score / used.sqrt(), "x": x, "y": y, "valid": valid.sum(-1)}
        return TensorDict({**scores, "duplicates": table.duplicates, "finite": table.finite})

    def _line(self, logs: Float[Tensor, "*lead l m"], n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the points of the fit, NaN beyond its end, and their number."""
        place = torch.arange(1, logs.shape[-1], device=logs.device)
        # A share of 0.9 of 10 points is 9, whatever binary fractions make of it.
        last = torch.minimum(n - 1, ((1 - self.discard) * n + 1e-9).floor())
        x = torch.where(place <= last, logs.sort(-1).values[..., :-1], torch.nan)
        y = torch.where(place <= last, -torch.log1p(-place / n.double()), torch.nan)
        return x, y, last.squeeze(-1).double()

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        least = scores["valid"].masked_fill(~scores["finite"], LEAST)
        if least.numel() and int(least.min()) < LEAST:
            raise ConfigError(
                f"{self.in_key!r} has {int(least.min())} valid points, with two neighbours that are not the same; "
                f"twonn needs at least {LEAST} points: remove rows that are repeated, or lower eps={self.eps}"
            )
        found = [scores["score"][..., 0]]
        return [*found, scores["x"][..., 0, :], scores["y"][..., 0, :]] if self.return_xy else found


def _suffixed(key: Any, end: str) -> Any:
    return key + end if isinstance(key, str) else (*key[:-1], key[-1] + end)
