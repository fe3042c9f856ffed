"""How many directions a layer fills, by the entropy of its spectrum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.spectrum_estimator import SpectrumEstimator
from tdprobe.registry import Mode, Spec, check_mode, register
from tdprobe.stats.spectrum import SpectrumTable, renyi_entropy


@register(
    Spec(
        name="effective_rank",
        kind="layer",
        symmetric=False,
        bounds=(1.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("moments",),
        cost="n d^2 + d^3",
        reference="Roy, Vetterli 2007, The effective rank: a measure of effective dimensionality",
    )
)
class EffectiveRankEstimator(SpectrumEstimator):
    """Measure the effective rank of the covariance.

    ``exp(-sum p log p)`` with ``p`` the singular values of a matrix divided by their sum; the matrix is the covariance
    of the rows here, so p are its eigenvalues. It lies between the participation ratio and the rank. RankMe
    (`RankMeEstimator`) is the effective rank of the matrix of rows itself: its p are square roots of eigenvalues, so
    small directions count for more, and by default it does not centre.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        center: Subtract the column means; otherwise the matrix is ``X'X``.
        normalize_rows: Divide each row by its length, before centring.
        mode: ``"strict"`` or ``"robust"``; both say the same.

    Raises:
        ConfigError: A bad key, flag or mode.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.cat([torch.eye(5), -torch.eye(5)])
        >>> round(float(EffectiveRankEstimator()(TensorDict({"data": x}))["effective_rank"]), 4)
        5.0

    References:
        Roy, Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "effective_rank",
        *,
        center: bool = True,
        normalize_rows: bool = False,
        mode: Mode = "strict",
    ) -> None:
        super().__init__(in_key, out_key, center, normalize_rows)
        self.mode = check_mode(mode)

    def _value(self, table: SpectrumTable) -> Float[Tensor, "*lead l"]:
        return renyi_entropy(table.shares).exp()
