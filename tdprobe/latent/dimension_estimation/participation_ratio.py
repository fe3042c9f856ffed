"""How many directions the variance of a layer spreads over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.spectrum_estimator import SpectrumEstimator
from tdprobe.registry import Mode, Spec, check_mode, register
from tdprobe.stats.spectrum import Spectrum, SpectrumTable


@register(
    Spec(
        name="participation_ratio",
        kind="layer",
        symmetric=False,
        bounds=(1.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("moments",),
        cost="n d^2",
        reference="Gao et al. 2017, A theory of multineuronal dimensionality, dynamics and measurement",
    )
)
class ParticipationRatioEstimator(SpectrumEstimator):
    """Count the directions that the variance spreads over.

    ``(sum lambda)^2 / sum lambda^2`` of the eigenvalues of the covariance, which is ``(tr C)^2 / |C|_F^2`` and needs
    no eigenvalues: d for a covariance of all equal ones, 1 where all variance lies in one direction. It is the
    exponential of the matrix entropy of order 2, and of few samples it is too small: at most n - 1.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        center: Subtract the column means; without it a common offset is a direction, often the largest.
        normalize_rows: Divide each row by its length, before centring.
        mode: ``"strict"`` or ``"robust"``; both say the same.

    Raises:
        ConfigError: A bad key, flag or mode.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.cat([torch.eye(5), -torch.eye(5)])
        >>> round(float(ParticipationRatioEstimator()(TensorDict({"data": x}))["participation_ratio"]), 4)
        5.0

    References:
        Gao, Trautmann, Yu, Santhanam, Ryu, Shenoy, Ganguli 2017, A theory of multineuronal dimensionality, dynamics
        and measurement.
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "participation_ratio",
        *,
        center: bool = True,
        normalize_rows: bool = False,
        mode: Mode = "strict",
    ) -> None:
        super().__init__(in_key, out_key, center, normalize_rows)
        self.mode = check_mode(mode)

    def derivation(self, state: Any) -> Spectrum:
        """Ask for the sum of squared eigenvalues only."""
        return Spectrum(self.center, self.normalize_rows, values=False)

    def _value(self, table: SpectrumTable) -> Float[Tensor, "*lead l"]:
        return 1 / table.purity
