"""How differently two representations serve linear prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tdprobe.latent.representation_similarity.cross_moments import CrossMomentsEstimator, require_ridge
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.spectra import Axes, PairMeasure


@dataclass(frozen=True)
class Gulp(PairMeasure):
    """Take the distance of the ridge regressions on two layers of unit total variance.

    Args:
        ridge: The ridge, above 0.
    """

    of_itself: ClassVar[float | None] = 0.0
    ridge: float

    def __call__(self, covariance: Tensor, a: Axes, b: Axes) -> tuple[Tensor, Tensor]:
        """Take the distance; both ways are the same."""
        left, right = (layer.variances + self.ridge * layer.total.unsqueeze(-1) for layer in (a, b))
        shared = (covariance.square() / (left.unsqueeze(-1) * right.unsqueeze(-2))).sum((-2, -1))
        own_a, own_b = ((x.variances / level).square().sum(-1) for x, level in ((a, left), (b, right)))
        distance = (own_a + own_b - 2 * shared).clamp(min=0).sqrt()
        return distance, distance


@register(
    Spec(
        name="gulp",
        kind="pair",
        symmetric=True,
        bounds=(0.0, float("inf")),
        larger_means="less similar",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("cross",),
        cost="n d^2 per pair to stream, d^3 per pair to score",
        reference="Boix-Adsera et al. 2022, GULP: a prediction-based metric between representations",
    )
)
class GulpEstimator(CrossMomentsEstimator):
    """Measure how much the predictions of ridge regressions on two representations can differ, over all targets.

    ``d^2 = tr(P_x S_x P_x S_x) + tr(P_y S_y P_y S_y) - 2 tr(P_x S_xy P_y S_yx)`` with ``P = (S + ridge I)^-1`` and the
    covariances S of layers that are centred and scaled to a total variance of 1: the distance of the predictions,
    averaged over random targets of unit norm. It is a metric up to turning and scaling. A small ridge approaches the
    distance of canonical correlations, ``d_x + d_y - 2 sum rho^2``; a large one, times itself, ``|S_x|^2 + |S_y|^2 -
    2 |S_xy|^2``, which is linear CKA before its normalisation. ``mode`` changes nothing.

    With ``sketch`` only the large axes are kept well. Between layers of SmolLM2 (d = 576, sketch=256) the value is 1.1
    too high on average and 1.8 at most, of 1.5 to 4.7 (rank correlation 0.99); with ``ridge=0.1`` 0.2 and 0.34, of 0.25
    to 0.98 (0.995).

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        ridge: Added to every variance, relative to the total variance.
        sketch: Columns to keep of wider layers, for speed.
        mode: ``"strict"`` or ``"robust"``.

    Raises:
        ConfigError: A bad key, mode or sketch, or a negative ``ridge``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> GulpEstimator(ridge=0.5)(TensorDict({"data_a": x[:, :1], "data_b": x[:, 1:]}))["gulp"]
        tensor(0.9428)

    References:
        Boix-Adsera, Lawrence, Stepaniants, Rigollet 2022, GULP: a prediction-based metric between representations.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "gulp",
        ridge: float = 1e-2,
        *,
        sketch: int | None = None,
        mode: Mode = "strict",
    ) -> None:
        super().__init__((in_key_a, in_key_b, out_key), sketch, mode)
        require_ridge(ridge)
        self.ridge = ridge

    def measure(self) -> Gulp:
        """Regress with this ridge."""
        return Gulp(float(self.ridge))
