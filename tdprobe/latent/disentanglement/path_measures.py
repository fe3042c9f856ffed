"""What is measured along a path on which a latent dimension moves: smoothness and monotonicity of an attribute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError, unknown
from tdprobe.stats.paths import PathMeasure

MAX_MODES = ("lehmer", "naive")


@dataclass(frozen=True)
class Smooth(PathMeasure):
    """Measure smoothness, see `smoothness`; NaN where the latent dimension stands still in some step.

    Args:
        max_mode: ``"lehmer"`` or ``"naive"``.
        ptp_mode: ``"naive"``, or a share.
        clamp: Move results into [0, 1].
        p: Power of the Lehmer mean.

    Raises:
        ConfigError: None of these.
    """

    least: ClassVar[int] = 3
    max_mode: str = "lehmer"
    ptp_mode: float | str = "naive"
    clamp: bool = False
    p: float = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("max_mode", self.max_mode, MAX_MODES)
        share = self.ptp_mode
        if share != "naive" and (isinstance(share, (str, bool)) or not 0 < share <= 1):
            raise ConfigError(f"got ptp_mode={share!r}; allowed are 'naive' and numbers above 0 up to 1")
        if not self.p > 1:
            raise ConfigError(f"got p={self.p!r}; the power of a Lehmer mean is above 1")

    def __call__(self, x: Float[Tensor, "*b t"], y: Float[Tensor, "*b t"]) -> Float[Tensor, "*b"]:
        """Measure paths of one length."""
        slope, error = _slopes(x, y)
        bends = slope.diff(dim=-1).abs()
        straight = (bends <= error[..., 1:] + error[..., :-1]).all(-1)
        bend = bends.amax(-1) if self.max_mode == "naive" else _lehmer(bends, self.p)
        found = torch.where(straight, 1.0, 1 - bend / self._span(slope))
        found = found.clamp(0, 1) if self.clamp else found
        return torch.where(slope.isfinite().all(-1), found, torch.nan)

    def _span(self, slope: Float[Tensor, "*b u"]) -> Float[Tensor, "*b"]:
        if isinstance(self.ptp_mode, str):
            return slope.amax(-1) - slope.amin(-1)
        half = self.ptp_mode / 2
        return slope.quantile(0.5 + half, -1) - slope.quantile(0.5 - half, -1)


@dataclass(frozen=True)
class Monotone(PathMeasure):
    """Measure monotonicity, see `monotonicity`; NaN where the latent dimension stands still in some step.

    Args:
        liad_thresh: Smaller changes count as noise.
        degenerate_val: Value where every change is noise; ``None`` for NaN.

    Raises:
        ConfigError: A threshold below 0.
    """

    least: ClassVar[int] = 2
    liad_thresh: float = 1e-3
    # NaN is not equal to itself, and equal measures share their sums.
    degenerate_val: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.liad_thresh >= 0:
            raise ConfigError(f"got liad_thresh={self.liad_thresh!r}; allowed are numbers from 0 on")

    def __call__(self, x: Float[Tensor, "*b t"], y: Float[Tensor, "*b t"]) -> Float[Tensor, "*b"]:
        """Measure paths of one length."""
        slope, _ = _slopes(x, y)
        sign = slope.sign() * (slope.abs() > self.liad_thresh)
        count = (sign != 0).sum(-1)
        none = math.nan if self.degenerate_val is None else self.degenerate_val
        found = torch.where(count > 0, sign.sum(-1) / count, none)
        return torch.where(slope.isfinite().all(-1), found, torch.nan)


def check_choice(name: str, got: Any, allowed: tuple[str, ...]) -> None:
    """Refuse an option that does not exist."""
    if got not in allowed:
        raise ConfigError(unknown(name, str(got), allowed))


def _slopes(x: Tensor, y: Tensor) -> tuple[Float[Tensor, "*b u"], Float[Tensor, "*b u"]]:
    """Return the slope of each step, NaN or infinite in one that does not move x, and the error that rounding makes."""
    x_unit, y_unit = (torch.finfo(z.dtype).eps if z.is_floating_point() else 0.0 for z in (x, y))
    x, y = x.double(), y.double()
    step = x.diff(dim=-1)
    slope = y.diff(dim=-1) / step
    x_size, y_size = (z.abs().amax(-1, keepdim=True) for z in (x, y))
    # Twice what correct rounding of the values themselves leaves: they were computed.
    return slope, 2 * (y_unit * y_size + x_unit * x_size * slope.abs()) / step.abs()


def _lehmer(x: Float[Tensor, "*b u"], p: float) -> Float[Tensor, "*b"]:
    # Of ratios to the largest, which keeps powers in range.
    most = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    weight = (x / most).pow(p - 1)
    return (x * weight).sum(-1) / weight.sum(-1)
