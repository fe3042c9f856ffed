"""Intrinsic dimension at several scales, from neighbours of the ranks 1, 2, 4, 8, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.latent.dimension_estimation.neighbor_dimension import SPREAD, NeighborDimension, counted, suffixed
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighbors import Neighbors, as_neighbors

# Newton's method on the logarithm of the dimension doubles its digits in each step: one below 1e-8 is the last.
STEPS = 60


@register(
    Spec(
        name="gride",
        kind="layer",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer, for a bank of n rows",
        reference="Denti et al. 2022, The generalized ratios intrinsic dimension estimator",
    )
)
class GrideDimensionEstimator(NeighborDimension):
    """Estimate the dimension from the ratio of distances to the neighbours of ranks n1 and 2 n1, scale by scale.

    For locally constant density ``mu = r_n2 / r_n1`` has the density
    ``d (mu^d - 1)^(n2 - n1 - 1) / (mu^((n2 - 1) d + 1) B(n2 - n1, n1))``; d maximises the likelihood, and the error is
    ``1 / sqrt(information)`` there.
    Larger ranks look at a larger scale, beyond noise but not beyond curvature: where the dimension does not change with
    the scale, it can be trusted.

    Rows that are equal count once. Points with fewer than n2 distinct neighbours do not count.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        n1: Rank of the nearer neighbour whose estimate is the score, a power of two.
        range_max: Largest rank; as far as there are rows.
        return_scales: Also write the estimates of all scales, ``(*lead, s)`` float32, and their errors, under the out
            key followed by ``_scales`` and ``_scales_se``.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``; they agree.

    Raises:
        ConfigError: A bad key or mode, ``n1`` no power of two, or a ``range_max`` below ``2 n1``.

    Example:
        >>> square = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> td = GrideDimensionEstimator(return_scales=True)(TensorDict({"data": square}))
        >>> abs(float(td["dimension"]) - 2) < 0.2, td["dimension_scales"].shape
        (True, torch.Size([6]))

    References:
        Denti, Doimo, Laio, Mira 2022, The generalized ratios intrinsic dimension estimator.
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "dimension",
        n1: int = 2,
        range_max: int = 64,
        return_scales: bool = False,
        *,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        ends = ("_scales", "_scales_se") if return_scales else ()
        super().__init__(in_key, [out_key, *(suffixed(out_key, end) for end in ends)], bank_size=bank_size, mode=mode)
        if not isinstance(n1, int) or n1 < 1 or n1 & (n1 - 1):
            raise ConfigError(f"got n1={n1!r}; allowed are powers of two: 1, 2, 4, ...")
        if range_max < 2 * n1:
            raise ConfigError(f"got range_max={range_max!r}; with n1={n1} allowed are ranks from {2 * n1} on")
        self.n1, self.range_max, self.return_scales = n1, range_max, return_scales

    def _scales(self, n: int) -> list[int]:
        """Return the ranks n1 of all scales."""
        most = min(self.range_max, n - 1)
        return [2**power for power in range(most.bit_length() - 1)]

    def derivation(self, state: Any) -> Neighbors:
        """Ask for the neighbours of ranks 1, 2, 4, ..."""
        scales = self._scales(int(state.n))
        return Neighbors(tuple(sorted({*scales, *(2 * scale for scale in scales)})))

    def score(self, state: Any) -> TensorDict:
        """Estimate the dimension of each layer.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"`` and its standard error ``"se"``, ``(*lead, l)`` float64, of scale n1: 1.5 times that of
            independent points; ``"scales"`` and ``"scales_se"``, ``(*lead, l, s)``, the latter for independent points;
            ``"ranks"``, ``(s,)`` int64, the n1 of each; ``"duplicates"`` and
            ``"finite"``. A scale at which all ratios are 1 is NaN.

        Raises:
            ConfigError: Fewer than 2 n1 + 1 rows.
        """
        self._require(state, 2 * self.n1 + 1, f"n1={self.n1}")
        table, ranks = as_neighbors(state, self.derivation(state)), self._scales(int(state.n))
        found = [_fitted(*self._logs(table, n1), n1) for n1 in ranks]
        scales, errors = (torch.stack(column, -1) for column in zip(*found, strict=True))
        place = ranks.index(self.n1)
        facts = {"scales": scales, "scales_se": errors, "ranks": torch.tensor(ranks, device="cpu")}
        return self._scores(table, score=scales[..., place], se=SPREAD * errors[..., place], **facts)

    def _logs(self, table: Any, n1: int) -> tuple[Tensor, Tensor]:
        valid = counted(table, 2 * n1)
        return torch.where(valid, (table.at(2 * n1) / table.at(n1)).log(), 0), valid

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        found = [scores["score"][..., 0]]
        if not self.return_scales:
            return found
        return [*found, scores["scales"][..., 0, :], scores["scales_se"][..., 0, :]]


def _fitted(x: Float[Tensor, "*lead l m"], valid: Tensor, n1: int) -> tuple[Tensor, Tensor]:
    """Return the dimension that makes logarithms of ratios, 0 where not valid, most likely, and its error.

    With ``g = x / (1 - e^(-d x))``, which is ``1 / d`` at x = 0, the derivative of the likelihood is
    ``n / d + (n1 - 1) sum(g) - (2 n1 - 1) sum(x)``, and falls with d. Its root is taken with n - 1 for n, which for
    n1 = 1 leaves no bias.
    """
    n, total = valid.sum(-1).double(), x.sum(-1)
    d = (n - 1) / total
    for _ in range(STEPS):
        slope, information = _derivatives(d, x, valid, n, total, n1)
        slope = slope - 1 / d
        # In the logarithm of d a step never leaves the positive numbers; far from the root it is cut short.
        step = (slope / (information * d)).clamp(-1, 1)
        d = d * step.exp()
        if bool((step.abs().nan_to_num() < 1e-8).all()):
            break
    _, information = _derivatives(d, x, valid, n, total, n1)
    known = (n > 1) & (total > 0)
    return torch.where(known, d, torch.nan), torch.where(known, information.rsqrt(), torch.nan)


def _derivatives(
    d: Tensor, x: Tensor, valid: Tensor, n: Tensor, total: Tensor, n1: int
) -> tuple[Float[Tensor, "*lead l"], Float[Tensor, "*lead l"]]:
    """Return the derivative of the log likelihood, and the second one with its sign changed."""
    scaled = d.unsqueeze(-1) * x
    g = torch.where(scaled > 0, x / -torch.expm1(-scaled), 1 / d.unsqueeze(-1))
    g = torch.where(valid, g, 0)
    slope = n / d + (n1 - 1) * g.sum(-1) - (2 * n1 - 1) * total
    return slope, n / d.square() + (n1 - 1) * (g.square() * (-scaled).exp()).sum(-1)
