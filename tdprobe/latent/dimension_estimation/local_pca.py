"""Intrinsic dimension by principal components of the neighbourhood of each point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.dimension_estimation.neighbor_dimension import SPREAD, NeighborDimension, counted, suffixed
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighbors import Neighbors, as_neighbors

Rule = Literal["fo", "fan", "maxgap", "ratio"]
# Numbers in the neighbourhoods of one block, and variance that rounding leaves where there is none.
BLOCK, FLOOR = 2**22, 1e-13
# Fan et al. 2010: a gap this large, or this share of the variance, both beyond the noise of the last twentieth.
FAN_GAP, FAN_SHARE, FAN_SIGNAL = 10.0, 0.8, 0.95


@register(
    Spec(
        name="local_pca",
        kind="layer",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d + n k^2 (k + d) per layer, for a bank of n rows",
        reference="Fukunaga, Olsen 1971, An algorithm for finding intrinsic dimensionality of data",
    )
)
class LocalPcaDimensionEstimator(NeighborDimension):
    """Count the principal components of the k nearest neighbours of each point; the score is the mean over points.

    With ``v_1 >= v_2 >= ...`` the variances along the components:

    - ``"fo"`` (Fukunaga, Olsen): those above ``alpha v_1``, by default 0.05;
    - ``"ratio"``: as many as it takes to hold a share ``alpha`` of the variance, by default 0.95;
    - ``"maxgap"``: up to the largest ``v_i / v_i+1``;
    - ``"fan"`` (Fan et al.): up to the first gap above ``alpha``, by default 10, or to four fifths of the variance,
      whichever comes first, after the mean of the components behind 95 % of it is taken off as noise.

    At most k - 1 components show in k neighbours. Rows that are equal count once; which of the rows that are tied for
    the last place are taken depends on their values only. Points with fewer than k distinct neighbours do not count.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k: Neighbours, 3 or more, and more than the dimension.
        rule: Which components count.
        alpha: Threshold of the rule; ``"maxgap"`` has none.
        return_pointwise: Also write the dimension at each point, ``(*lead, n)`` float32, under the out key followed by
            ``_pointwise``.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``; they agree.

    Raises:
        ConfigError: A bad key, ``k`` below 3, an ``alpha`` that is not positive, an unknown rule or mode.

    Example:
        >>> square = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 9)
        >>> float(LocalPcaDimensionEstimator(rule="maxgap")(TensorDict({"data": square}))["dimension"])
        2.0

    References:
        Fukunaga, Olsen 1971, An algorithm for finding intrinsic dimensionality of data.
        Fan, Gu, Qiao, Zhang 2010, Intrinsic dimension estimation of data by principal component analysis.
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "dimension",
        k: int = 50,
        rule: Rule = "fo",
        alpha: float | None = None,
        return_pointwise: bool = False,
        *,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        keys = [out_key, suffixed(out_key, "_pointwise")] if return_pointwise else [out_key]
        super().__init__(in_key, keys, bank_size=bank_size, mode=mode)
        if isinstance(k, bool) or not isinstance(k, int) or k < 3:
            raise ConfigError(f"got k={k!r}; allowed are integers from 3 on, such as 50")
        if rule not in get_args(Rule):
            raise ConfigError(unknown("rule", rule, get_args(Rule)))
        if alpha is not None and not alpha > 0:
            raise ConfigError(f"got alpha={alpha!r}; allowed are numbers above 0")
        self.k, self.rule, self.alpha, self.return_pointwise = k, rule, alpha, return_pointwise

    def derivation(self, state: Any) -> Neighbors:
        """Ask which rows are the k nearest."""
        return Neighbors((self.k,), places=self.k)

    def score(self, state: Any) -> TensorDict:
        """Estimate the dimension of each layer.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"`` and ``"se"``, ``(*lead, l)`` float64: 1.5 times that of a mean of independent points;
            ``"pointwise"``, ``(*lead, l, n)`` in the order of the sample ids; ``"duplicates"`` and ``"finite"``.

        Raises:
            ConfigError: Fewer than k + 1 rows.
        """
        self._require(state, self.k + 1, f"k={self.k}")
        table = as_neighbors(state, self.derivation(state))
        pointwise = torch.full(table.first.shape, torch.nan, dtype=torch.float64, device=table.first.device)
        valid, last = counted(table, self.k), table.at(self.k) < torch.inf
        for index in product(*map(range, valid.shape[:-1])):
            (rows,) = last[index].nonzero().unbind(1)
            x = table.rows[str(index[-1])][index[:-1]]
            for part in rows.split(max(1, BLOCK // max(1, self.k * x.shape[-1]))):
                pointwise[index][part] = self._dimensions(x, table.places[index][part, : self.k])
        terms = pointwise.masked_fill(~valid, torch.nan)
        score, count = terms.nanmean(-1), valid.sum(-1).double()
        variance = (terms - score.unsqueeze(-1)).square().nansum(-1) / (count - 1)
        facts = {"se": SPREAD * (variance / count).sqrt(), "pointwise": pointwise[..., table.ids.argsort()]}
        return self._scores(table, score=score, **facts)

    def _dimensions(self, x: Float[Tensor, "n d"], places: Int[Tensor, "r k"]) -> Float[Tensor, "r"]:
        variances = _variances(x[places].double())
        rules: dict[str, Callable[[Tensor, float], Tensor]] = {
            "fo": _fo,
            "fan": _fan,
            "maxgap": _maxgap,
            "ratio": _ratio,
        }
        default = {"fo": 0.05, "fan": FAN_GAP, "maxgap": 0.0, "ratio": 0.95}[self.rule]
        found = rules[self.rule](variances, default if self.alpha is None else self.alpha)
        return found.double().masked_fill(variances[:, 0] == 0, torch.nan)

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        found = [scores["score"][..., 0]]
        return [*found, scores["pointwise"][..., 0, :]] if self.return_pointwise else found


def _variances(x: Float[Tensor, "r k d"]) -> Float[Tensor, "r m"]:
    """Return the variances along the principal components, descending, min(k - 1, d) of them."""
    x = x - x.mean(1, keepdim=True)
    # Squares of numbers near 1 neither overflow nor vanish.
    x = x / x.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    rank = min(x.shape[1] - 1, x.shape[2])
    product = x.mT @ x if x.shape[2] < x.shape[1] else x @ x.mT
    found = torch.linalg.eigvalsh(product).flip(-1)[:, :rank]
    return found.clamp(min=FLOOR * found[:, :1])


def _fo(variances: Tensor, alpha: float) -> Tensor:
    return (variances > alpha * variances[:, :1]).sum(1)


def _ratio(variances: Tensor, alpha: float) -> Tensor:
    held = variances.cumsum(1)
    return ((held / held[:, -1:] < alpha).sum(1) + 1).clamp(max=variances.shape[1])


def _maxgap(variances: Tensor, alpha: float) -> Tensor:
    if variances.shape[1] == 1:
        return torch.ones_like(variances[:, 0])
    return (variances[:, :-1] / variances[:, 1:]).argmax(1) + 1


def _fan(variances: Tensor, alpha: float) -> Tensor:
    held, count = variances.cumsum(1), variances.shape[1]
    places = torch.arange(count, device=variances.device)
    behind = places >= (held / held[:, -1:] <= FAN_SIGNAL).sum(1, keepdim=True)
    noise = (variances * behind).sum(1, keepdim=True) / behind.sum(1, keepdim=True)
    signal = variances - noise
    enough = signal.cumsum(1) / signal.sum(1, keepdim=True) > FAN_SHARE
    gap = torch.nn.functional.pad(signal[:, :-1] / signal[:, 1:], (0, 1), value=-torch.inf) > alpha
    # Where neither happens, all components count.
    return torch.where(enough | gap, places, count - 1).amin(1) + 1
