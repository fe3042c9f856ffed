"""Canonical correlations weighted by how much of the columns they account for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdprobe.latent.representation_similarity.cca import Correlations
from tdprobe.latent.representation_similarity.cross_moments import CrossMomentsEstimator, require_ridge
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.spectra import Axes, PairMeasure, svd, weighted


@dataclass(frozen=True)
class ProjectionWeighted(PairMeasure):
    """Weigh canonical correlations by the projections of the columns of either layer.

    Args:
        ridge: Added to the variances, relative to their sum.
        known: NaN where a layer has as many axes as the rows allow, see `Correlations`.
    """

    ridge: float = 0.0
    known: bool = False

    def __call__(self, covariance: Tensor, a: Axes, b: Axes) -> tuple[Tensor, Tensor]:
        """Weigh by the first layer, and by the second."""
        plain = Correlations(ridge=self.ridge, known=self.known)
        left, right = plain.whitening(a), plain.whitening(b)
        u, rho, v = svd(weighted(covariance, left, right))
        # Directions beyond the smaller rank are arbitrary.
        used = torch.arange(rho.shape[-1], device=rho.device) < torch.minimum(a.rank, b.rank).unsqueeze(-1)
        u, v = u * used.unsqueeze(-2), v * used.unsqueeze(-1)
        there, back = _weighted_mean(u, rho, a, left), _weighted_mean(v.mT, rho, b, right)
        certain = plain.certain(a, left, right)
        return torch.where(certain, torch.nan, there), torch.where(certain, torch.nan, back)


def _weighted_mean(directions: Tensor, rho: Tensor, layer: Axes, white: Tensor) -> Tensor:
    """Average with ``w_k = sum_j |cov(h_k, x_j)|`` of the variates ``h = x A D u``: ``cov(h, x) = u' D V A'``."""
    p = directions.shape[-2]
    scales = (white * layer.variances)[..., :p, None]
    sums = (layer.vectors[..., :p] @ (scales * directions)).abs().sum(-2)
    # Rounding may leave the bounds.
    return ((sums * rho).sum(-1) / sums.sum(-1)).clamp(max=1)


@register(
    Spec(
        name="pwcca",
        kind="pair",
        symmetric=False,
        bounds=(0.0, 1.0),
        larger_means="more similar",
        invariant_to=frozenset({"permutation", "isotropic scaling", "translation"}),
        needs=("cross",),
        cost="n d^2 per pair to stream, 2 d^3 per pair to score",
        reference="Morcos et al. 2018, Insights on representational similarity with canonical correlation",
    )
)
class PwccaEstimator(CrossMomentsEstimator):
    """Measure the mean canonical correlation, where directions count by what they account for in the first layer.

    ``sum_k w_k rho_k / sum_k w_k`` with ``w_k = sum_j |<h_k, x_j>|``, the projections of the centred columns ``x_j`` of
    the first layer onto its canonical variates ``h_k``. Any widths will do: there are as many variates as the smaller
    rank. The value depends on the columns of the first layer and not only on what they span, but not on those of the
    second: swapping the two changes it. Where a layer has as many axes as rows allow, it is 1 whatever the layers; with
    ``mode="robust"`` that is NaN.

    With ``sketch`` the columns are those of the sketch: another quantity. Between layers of SmolLM2 (d = 576,
    sketch=256) it is 0.05 lower on average and 0.19 at most, of 0.43 to 0.85 (rank correlation 0.93).

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``, whose columns give the weights.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        ridge: Added to every variance of a layer before whitening, relative to its total variance.
        sketch: Columns to keep of wider layers, for speed.
        mode: ``"strict"`` or ``"robust"``.

    Raises:
        ConfigError: A bad key, mode or sketch, or a negative ``ridge``.

    Example:
        >>> from tensordict import TensorDict
        >>> x = torch.randn(100, 3, dtype=torch.float64)
        >>> PwccaEstimator()(TensorDict({"data_a": x, "data_b": x @ torch.ones(3, 5).triu().double()}))["pwcca"]
        tensor(1.)

    References:
        Morcos, Raghu, Bengio 2018, Insights on representational similarity in neural networks with canonical
        correlation.
    """

    # The weights are sums over columns.
    turnable: ClassVar[bool] = False

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "pwcca",
        *,
        ridge: float = 0.0,
        sketch: int | None = None,
        mode: Mode = "strict",
    ) -> None:
        super().__init__((in_key_a, in_key_b, out_key), sketch, mode)
        require_ridge(ridge)
        self.ridge = ridge

    def measure(self) -> ProjectionWeighted:
        """Weigh by the columns of either layer."""
        return ProjectionWeighted(float(self.ridge), self.mode == "robust")
