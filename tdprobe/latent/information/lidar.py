"""How many directions tell samples apart, beyond what views of one sample differ by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import SupervisedEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats.group_moments import GroupMoments, GroupMomentsState, within_and_between
from tdprobe.stats.spectrum import CONSTANT, renyi_entropy, spectral_shares
from tdprobe.stats.state import Statistic


@register(
    Spec(
        name="lidar",
        kind="supervised",
        symmetric=False,
        bounds=(1.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("group_moments",),
        cost="n d^2 + d^3",
        reference="Thilak et al. 2024, LiDAR: sensing linear probing performance in joint embedding architectures",
    )
)
class LidarEstimator(SupervisedEstimator):
    """Measure the rank that linear discriminant analysis sees.

    The effective rank ``exp(-sum p log p)`` of ``(W + delta w I)^-1 B``, with W the covariance of the views of a sample
    around their mean, B that of the means of samples, and w the mean variance within (``tr W / d``): the scale of a
    layer never matters. The paper adds ``delta I`` instead. With q views W has some noise left in B: more views help.

    Rows may come in any order. `LayerScoring` reads the number of the sample of each row from the call:
    ``hooked(views, sample=numbers)``. Samples with one view only do not count; classes may stand for samples.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        sample_key: Key of the number of the sample that each row is a view of, ``(n,)`` or ``(*lead, n)``, the same in
            all data sets.
        out_key: Key to write, ``(*lead,)`` float32.
        delta: Ridge, relative to the mean variance within samples; 0 makes the score invariant to invertible maps.

    Raises:
        ConfigError: A bad key, or a negative ``delta``.

    Example:
        >>> centres = 10 * torch.cat([torch.eye(3), -torch.eye(3)])
        >>> views = torch.cat([centres + step for step in (*torch.eye(3), *-torch.eye(3))])
        >>> td = TensorDict({"data": views, "sample": torch.arange(6).repeat(6)})
        >>> round(float(LidarEstimator()(td)["lidar"]), 4)
        3.0

    References:
        Thilak, Huang, Saremi, Dinh, Goh, Nakkiran, Susskind, Littwin 2024, LiDAR: sensing linear probing performance
        in joint embedding SSL architectures.
    """

    def __init__(
        self, in_key: Any = "data", sample_key: Any = "sample", out_key: Any = "lidar", *, delta: float = 1e-4
    ) -> None:
        super().__init__([in_key, sample_key], [out_key])
        if not delta >= 0:
            raise ConfigError(f"got delta={delta!r}; allowed are numbers from 0 on, relative to the variance within")
        self.in_key, self.sample_key, self.out_key, self.delta = in_key, sample_key, out_key, delta

    def statistic(self) -> Statistic:
        """Return `GroupMoments`."""
        return GroupMoments()

    def score(self, state: GroupMomentsState) -> TensorDict:
        """Score each layer.

        Returns:
            ``"score"``, ``(*lead, l, 1)`` float64, NaN for layers that are not finite, that do not vary within
            samples or between them, and without a ridge for those of a singular ``W``; ``"finite"``.

        Raises:
            ConfigError: Fewer than 2 samples with 2 views or more.
        """
        several = int((state.counts > 1).sum())
        if several < 2 and state.moments.mu["0"].shape[:-1].numel():
            raise ConfigError(
                f"got {several} samples with 2 views or more among {int(state.n)} rows; lidar needs at least 2, so 4 "
                f"rows: rows are views of one sample if they have the same number under {self.sample_key!r}"
            )
        layers = [str(i) for i in range(len(state.sums.keys()))]
        finite = torch.stack([state.sums[i].isfinite().flatten(-2).all(-1) for i in layers], -1)
        score = torch.stack([self._rank(state, i) for i in layers], -1).unsqueeze(-1)
        return TensorDict({"score": score, "finite": finite})

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["score"][..., 0, 0]]

    def _rank(self, state: GroupMomentsState, layer: str) -> Float[Tensor, "*lead"]:
        within, between = within_and_between(state, layer)
        d = within.shape[-1]
        variance, others = (part.diagonal(dim1=-2, dim2=-1).sum(-1) for part in (within, between))
        power = variance + others + state.moments.mu[layer].square().sum(-1)
        # Written so that NaN is bad too.
        good = torch.minimum(variance, others) > CONSTANT * power
        eye = torch.eye(d, dtype=within.dtype, device=within.device)
        ridge = self.delta * variance[..., None, None] / max(1, d) * eye
        # The solvers refuse NaN, in one data set for all.
        factor, failed = torch.linalg.cholesky_ex(torch.where(good[..., None, None], within + ridge, eye))
        good = good & (failed == 0)
        factor = torch.where(good[..., None, None], factor, eye)
        half = torch.linalg.solve_triangular(factor, between, upper=False)
        matrix = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        matrix = (matrix + matrix.mT) / (2 * matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])
        return renyi_entropy(spectral_shares(matrix)).exp().masked_fill(~good, torch.nan)
