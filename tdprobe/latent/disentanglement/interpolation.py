"""How attributes of generated samples change along latent dimensions: smoothness and monotonicity."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.latent.attribute_inputs import real, regularised
from tdprobe.latent.disentanglement.path_measures import Monotone, Smooth, check_choice
from tdprobe.stats.paths import PathMeasure

LIAD = ("forward",)
REDUCE = ("attribute", "sample", "all", "none")


def smoothness(
    z: Any,
    a: Any,
    reg_dim: Any = None,
    liad_mode: str = "forward",
    max_mode: str = "lehmer",
    ptp_mode: float | str = "naive",
    reduce_mode: str = "attribute",
    clamp: bool = False,
    p: float = 2.0,
) -> Any:
    """Compute how smoothly an attribute changes while its latent dimension moves.

    ``1 - C_k |D2_k| / (R_k D1_k / step)`` with the first and second difference quotients D1 and D2 of the attribute
    along the dimension, C the Lehmer mean (or maximum) and R the range over the places k: 1 for a straight line, as far
    as the precision of the values tells. The steps of the dimension cancel, ``step D2_k = D1_(k+1) - D1_k``, so
    that they may be unequal.

    Args:
        z: Latents ``(n, t)`` or ``(n, f, t)``, t of 3 or more places, numpy or torch.
        a: Attributes of what is generated there, ``(n, t)`` or ``(n, m, t)``, m at most f.
        reg_dim: Latent dimension that moves for each attribute; by default 0, 1, ..., m - 1.
        liad_mode: ``"forward"``.
        max_mode: ``"lehmer"`` or ``"naive"`` (the maximum).
        ptp_mode: ``"naive"`` (largest minus smallest), or the share from 0 to 1 of the values in the middle, with which
            scores may be negative, and minus infinity where the middle is level.
        reduce_mode: Mean over samples, ``"attribute"``; over attributes, ``"sample"``; over both, ``"all"``; or
            ``"none"``.
        clamp: Move results into [0, 1].
        p: Power of the Lehmer mean, above 1.

    Returns:
        ``(m,)``, ``(n,)``, a scalar or ``(n, m)``, float64, as numpy or torch, like ``z``.

    Raises:
        ConfigError: Shapes or options that do not fit, NaN, or a latent that stands still in some step.

    Example:
        >>> import torch
        >>> z = torch.linspace(0, 1, 5).expand(2, 5)
        >>> smoothness(z, 3 * z + 1)
        tensor([1.], dtype=torch.float64)

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """
    check_choice("liad_mode", liad_mode, LIAD)
    return _measured(Smooth(max_mode, ptp_mode, clamp, p), z, a, reg_dim, reduce_mode, Tensor.mean)


def monotonicity(
    z: Any,
    a: Any,
    reg_dim: Any = None,
    liad_mode: str = "forward",
    reduce_mode: str = "attribute",
    liad_thresh: float = 1e-3,
    degenerate_val: float = float("nan"),
    nanmean: bool = True,
) -> Any:
    """Compute how consistently an attribute grows, or falls, while its latent dimension moves.

    The mean sign of the difference quotients whose size is above ``liad_thresh``: 1 if all grow, -1 if all fall.

    Args:
        z: Latents ``(n, t)`` or ``(n, f, t)``, t of 2 or more places, numpy or torch.
        a: Attributes of what is generated there, ``(n, t)`` or ``(n, m, t)``, m at most f.
        reg_dim: Latent dimension that moves for each attribute; by default 0, 1, ..., m - 1.
        liad_mode: ``"forward"``.
        reduce_mode: As in `smoothness`.
        liad_thresh: Smaller changes count as noise.
        degenerate_val: Value where every change is noise.
        nanmean: Leave NaN out of means.

    Returns:
        ``(m,)``, ``(n,)``, a scalar or ``(n, m)``, float64, as numpy or torch, like ``z``.

    Raises:
        ConfigError: Shapes or options that do not fit, NaN, or a latent that stands still in some step.

    Example:
        >>> import torch
        >>> z = torch.linspace(-2, 2, 5).expand(1, 5)
        >>> [monotonicity(z, a).item() for a in (z, -z, z**2)]
        [1.0, -1.0, 0.0]

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """
    check_choice("liad_mode", liad_mode, LIAD)
    if math.isnan(degenerate_val) and not nanmean and reduce_mode != "none":
        warnings.warn("degenerate_val is NaN and nanmean is False: means may be NaN", stacklevel=2)
    measure = Monotone(liad_thresh, None if math.isnan(degenerate_val) else degenerate_val)
    return _measured(measure, z, a, reg_dim, reduce_mode, Tensor.nanmean if nanmean else Tensor.mean)


def _measured(measure: PathMeasure, z: Any, a: Any, reg_dim: Any, reduce_mode: str, mean: Callable[..., Tensor]) -> Any:
    check_choice("reduce_mode", reduce_mode, REDUCE)
    found = measure(*_paths(z, a, reg_dim, measure.least))
    if reduce_mode != "none":
        found = mean(found) if reduce_mode == "all" else mean(found, 0 if reduce_mode == "attribute" else -1)
    return found if isinstance(z, Tensor) else found.numpy()


def _paths(z: Any, a: Any, reg_dim: Any, least: int) -> tuple[Tensor, Tensor]:
    """Check paths; return the latents that move and the attributes, ``(n, m, t)``, in the precision that they have."""
    x, y = real("z", z), real("a", a)
    for name, value in (("z", x), ("a", y)):
        if value.ndim not in (2, 3):
            raise ConfigError(f"{name} has shape {tuple(value.shape)}; it must be (n, t) or (n, columns, t)")
        if not bool(value.isfinite().all()):
            raise ConfigError(f"{name} holds NaN or infinite values; leave these samples out")
    x, y = (value if value.ndim == 3 else value.unsqueeze(1) for value in (x, y.to(x.device)))
    (n, f, t), m = x.shape, y.shape[1]
    if (n, t) != (y.shape[0], y.shape[2]):
        raise ConfigError(f"z has {n} samples at {t} places and a has {y.shape[0]} at {y.shape[2]}; they go together")
    if f < m or not n or not m or t < least:
        raise ConfigError(
            f"z has shape {(n, f, t)} and a has {(n, m, t)}; needed are samples, {least} places or more, and as many "
            "latent dimensions as attributes"
        )
    x = x[:, list(regularised(reg_dim, m, f)) if reg_dim is not None else slice(m)]
    if bool((x.diff(dim=-1) == 0).any()):
        raise ConfigError("z stands still between two places; every step must move the latent dimension")
    return x, y
