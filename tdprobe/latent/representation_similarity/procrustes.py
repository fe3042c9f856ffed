"""Distances of representations after the best rotation, and shape metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.representation_similarity.cross_moments import CrossMomentsEstimator
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.spectra import Axes, PairMeasure, weighted

Variant = Literal["angular", "normalised", "size-and-shape"]


@dataclass(frozen=True)
class Aligned(PairMeasure):
    """Take the distance of two layers, partly whitened, after the best rotation.

    Args:
        variant: The distance.
        alpha: 1 to leave layers as they are, 0 to whiten them.
        relative: Measure variances in units of the mean variance of the axes of a layer, and distances per row.
    """

    of_itself: ClassVar[float | None] = 0.0
    variant: Variant
    alpha: float
    relative: bool

    @property
    def along_axes(self) -> bool:
        """Tell whether layers are whitened at all."""
        return self.alpha < 1

    def _weights(self, layer: Axes) -> Tensor:
        unit = layer.variances.sum(-1) / layer.rank if self.relative else torch.full_like(layer.total, 1 / layer.n)
        white = torch.where(layer.variances > 0, layer.variances, torch.inf).rsqrt() * unit.sqrt().unsqueeze(-1)
        return torch.where(layer.variances > 0, self.alpha + (1 - self.alpha) * white, 0.0)

    def __call__(self, covariance: Tensor, a: Axes, b: Axes) -> tuple[Tensor, Tensor]:
        """Take the distance; both ways are the same."""
        size_a, size_b = a.total, b.total
        if self.along_axes:
            left, right = self._weights(a), self._weights(b)
            covariance = weighted(covariance, left, right)
            size_a, size_b = ((x.variances * w.square()).sum(-1) for x, w in ((a, left), (b, right)))
        common = torch.linalg.svdvals(covariance).sum(-1)
        if self.variant == "size-and-shape":
            distance = (size_a + size_b - 2 * common).clamp(min=0).sqrt() * (1 if self.relative else a.n**0.5)
        else:
            cosine = (common / (size_a * size_b).sqrt()).clamp(max=1)
            distance = cosine.arccos() if self.variant == "angular" else (2 - 2 * cosine).sqrt()
        return distance, distance


@register(
    Spec(
        name="procrustes",
        kind="pair",
        symmetric=True,
        bounds=(0.0, torch.pi / 2),
        larger_means="less similar",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("cross",),
        cost="n d^2 per pair to stream, d^3 per pair to score",
        reference="Williams et al. 2021, Generalized shape metrics on neural representations",
    )
)
class ProcrustesEstimator(CrossMomentsEstimator):
    """Measure how far two representations are apart after the best rotation.

    With centred columns and ``|X'Y|_*`` the sum of singular values, ``cos = |X'Y|_* / (|X|_F |Y|_F)``:

    - ``"angular"``: ``arccos(cos)``, in radians;
    - ``"normalised"``: ``sqrt(2 - 2 cos) = min_Q |X / |X|_F - Y Q / |Y|_F|_F``;
    - ``"size-and-shape"``: ``sqrt(|X|_F^2 + |Y|_F^2 - 2 |X'Y|_*) = min_Q |X - Y Q|_F``, which scaling changes.

    Layers of different widths are compared as if the narrower had further columns of zeros. All are metrics, and so
    they are with ``alpha``, which whitens the layers in part: ``X (alpha I + (1 - alpha) (X'X)^-1/2)``. At 1 nothing is
    whitened; at 0 everything, and the angular distance is the arc cosine of the mean canonical correlation of layers of
    one rank. In between it depends on the scale of the layers and on n. ``mode="robust"`` has variances relative to
    their mean in the layer instead, so that neither matters, and size-and-shape distances per row (divided by
    ``sqrt(n)``). Otherwise the modes agree.

    A distance is the root of a difference: for float32 rows, what is below about 1e-3 is rounding.

    With ``sketch`` the sum of singular values is too small where many of them count, hence distances too large: between
    layers of SmolLM2 (d = 576, sketch=256) angles by 0.14 on average and 0.28 at most, of 0.37 to 1.08; the order of
    pairs is kept (rank correlation 0.99).

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        variant: ``"angular"``, ``"normalised"`` or ``"size-and-shape"``.
        alpha: From 0, invariant to all invertible maps, to 1, invariant to rotations.
        sketch: Columns to keep of wider layers, for speed.
        mode: ``"strict"`` or ``"robust"``.

    Raises:
        ConfigError: A bad key, mode or sketch, an unknown ``variant``, or an ``alpha`` outside [0, 1].

    Example:
        >>> from tensordict import TensorDict
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> ProcrustesEstimator()(TensorDict({"data_a": x, "data_b": x[:, :1]}))["procrustes"]  # pi / 4
        tensor(0.7854)

    References:
        Williams, Kunz, Kornblith, Linderman 2021, Generalized shape metrics on neural representations.
        Ding, Denain, Steinhardt 2021, Grounding representation similarity through statistical testing.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "procrustes",
        variant: Variant = "angular",
        alpha: float = 1.0,
        *,
        sketch: int | None = None,
        mode: Mode = "strict",
    ) -> None:
        super().__init__((in_key_a, in_key_b, out_key), sketch, mode)
        if variant not in get_args(Variant):
            raise ConfigError(unknown("variant", variant, get_args(Variant)))
        if not 0 <= alpha <= 1:
            raise ConfigError(f"got alpha={alpha!r}; allowed are numbers from 0 (whitened) to 1 (as it is)")
        self.variant, self.alpha = variant, alpha

    def measure(self) -> Aligned:
        """Align by a rotation."""
        return Aligned(self.variant, float(self.alpha), self.mode == "robust")
