"""Intrinsic dimension from the two nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.dimension_estimation.neighbor_dimension import SPREAD, NeighborDimension, suffixed
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighbors import Neighbors, as_neighbors

Method = Literal["fit", "ml", "bayes"]
LEAST = 3
# Shape and rate of the Gamma prior of the dimension.
PRIOR = (2.0, 5.0)


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
    )
)
class TwoNnDimensionEstimator(NeighborDimension):
    """Estimate the intrinsic dimension from the distances to the first and second neighbour.

    For points of locally constant density ``mu = r_2 / r_1`` has ``P(mu < x) = 1 - x^-d``. With ``mu_i`` the
    i-th smallest of n, ``d`` is the slope through the origin of ``-log(1 - i / n)`` over ``log mu_i``; the largest,
    for which that is infinite, is left out.

    With ``"ml"`` it is ``(m - 1) / s``, the likelihood's maximum without its bias: m ratios are kept, ``s`` is the sum
    of their logarithms, and each one that is discarded counts as much as the largest that is kept (censored). With
    ``"bayes"`` it is ``(2 + m) / (5 + s)``, the mean of d after a Gamma(2, 5) prior.

    In strict mode neighbours up to a distance of ``eps`` do not count. That threshold is absolute, as in the original
    convention; ``distinct=True`` instead counts rows that are equal once, at any scale. The value is NaN where all
    ``mu`` are 1, as on a lattice, and where a value is not finite.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        return_xy: Also write the points of the line, ``(*lead, n - 1)`` float32 padded with NaN, under the out key
            followed by ``_x`` and ``_y``.
        eps: Distance up to which rows count as the same; not used with ``distinct``.
        discard: Share of the largest ``mu`` to leave out, where the density is least constant; by default 0.1 with
            ``mode="robust"``, else 0.
        distinct: Count rows that are equal once; by default with ``mode="robust"`` only.
        method: ``"fit"``, ``"ml"`` or ``"bayes"``.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``, which discards and counts equal rows once.

    Raises:
        ConfigError: A bad key, a negative ``eps``, a ``discard`` outside [0, 1), an unknown method or mode.

    Example:
        >>> square = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> td = TwoNnDimensionEstimator(discard=0.1)(TensorDict({"data": square}))
        >>> abs(float(td["dimension"]) - 2) < 0.2
        True

    References:
        Facco, d'Errico, Rodriguez, Laio 2017, Estimating the intrinsic dimension of datasets by a minimal
        neighborhood information.
        Denti, Doimo, Laio, Mira 2022, The generalized ratios intrinsic dimension estimator ("ml" and "bayes").
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "dimension",
        return_xy: bool = False,
        eps: float = 1e-5,
        *,
        discard: float | None = None,
        distinct: bool | None = None,
        method: Method = "fit",
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        keys = [out_key, *(suffixed(out_key, end) for end in ("_x", "_y") if return_xy)]
        super().__init__(in_key, keys, bank_size=bank_size, mode=mode)
        if not eps >= 0:
            raise ConfigError(f"got eps={eps!r}; allowed are distances from 0 on")
        if discard is not None and not 0 <= discard < 1:
            raise ConfigError(f"got discard={discard!r}; allowed are shares from 0 to below 1, such as 0.1")
        if method not in get_args(Method):
            raise ConfigError(unknown("method", method, get_args(Method)))
        self.return_xy, self.eps = return_xy, eps
        self.discard, self.distinct, self.method = discard, distinct, method

    @property
    def _distinct(self) -> bool:
        return self.mode == "robust" if self.distinct is None else self.distinct

    def derivation(self, state: Any) -> Neighbors:
        """Ask for the first two neighbours."""
        return Neighbors((1, 2), distinct=self._distinct, beyond=0.0 if self._distinct else self.eps)

    def score(self, state: Any) -> TensorDict:
        """Estimate the dimension of each layer.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"`` and its standard error ``"se"``, ``(*lead, l)`` float64: ``1.5 d / sqrt(points)``, or 1.5 times
            the spread of the posterior; ``"x"`` and ``"y"``, ``(*lead, l, n - 1)``; ``"valid"``, rows with two
            neighbours; ``"duplicates"`` and ``"finite"``. A layer with fewer than 3 valid rows scores NaN.

        Raises:
            ConfigError: Fewer than 3 rows.
        """
        table = as_neighbors(state, self.derivation(state))
        self._require(table, LEAST, "its two neighbours")
        first, second = table.at(1), table.at(2)
        valid = (first > 0) & (second < torch.inf)
        if self._distinct:
            valid &= ~table.repeated
        logs = torch.where(valid, (second / first).log(), torch.inf).sort(-1).values
        x, y, used = self._line(logs, valid.sum(-1, keepdim=True))
        if self.method == "fit":
            score = (x * y).nansum(-1) / x.square().nansum(-1)
            se = SPREAD * score / used.sqrt()
        else:
            score, se = self._likely(logs, valid.sum(-1, keepdim=True))
        enough = valid.sum(-1) >= LEAST
        score, se = (torch.where(enough & score.isfinite(), found, torch.nan) for found in (score, se))
        return self._scores(table, score=score, se=se, x=x, y=y, valid=valid.sum(-1))

    @property
    def _kept(self) -> float:
        by_mode = 0.1 if self.mode == "robust" else 0.0
        return 1 - (by_mode if self.discard is None else self.discard)

    def _likely(self, logs: Float[Tensor, "*lead l m"], n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dimension and its error from the likelihood of the smallest ratios, the others censored."""
        kept = (self._kept * n + 1e-9).floor().long()
        total = torch.where(torch.arange(logs.shape[-1], device=logs.device) < kept, logs, 0).sum(-1)
        largest = logs.gather(-1, (kept - 1).clamp(min=0)).squeeze(-1)
        total = total + torch.where(n > kept, (n - kept).double(), 0).squeeze(-1) * largest.nan_to_num(posinf=0)
        shape = (kept.double() - 1 if self.method == "ml" else PRIOR[0] + kept.double()).squeeze(-1)
        rate = total if self.method == "ml" else PRIOR[1] + total
        return shape / rate, SPREAD * shape.sqrt() / rate

    def _line(self, logs: Float[Tensor, "*lead l m"], n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the points of the fit, NaN beyond its end, and their number."""
        place = torch.arange(1, logs.shape[-1], device=logs.device)
        # A share of 0.9 of 10 points is 9, whatever binary fractions make of it.
        last = torch.minimum(n - 1, (self._kept * n + 1e-9).floor())
        x = torch.where(place <= last, logs[..., :-1], torch.nan)
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
