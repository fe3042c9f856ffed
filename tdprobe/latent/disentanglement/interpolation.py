"""How attributes of generated samples change along latent dimensions: smoothness and monotonicity."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.disentanglement.inputs import regularised, tensor

REDUCE = ("attribute", "sample", "all", "none")
# Steps along a latent dimension may differ by this share.
UNEVEN = 1e-4


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
    """Compute how smoothly an attribute changes while its latent dimension moves in equal steps.

    ``1 - C_k |D2_k| / (R_k D1_k / step)`` with the first and second difference quotients D1 and D2 of the attribute
    along the dimension, C the Lehmer mean (or maximum) and R the range over the places k: 1 for a straight line.

    Args:
        z: Latents ``(n, t)`` or ``(n, f, t)``, t of 3 or more places, numpy or torch.
        a: Attributes of what is generated there, ``(n, t)`` or ``(n, m, t)``, m at most f.
        reg_dim: Latent dimension that moves for each attribute; by default 0, 1, ..., m - 1.
        liad_mode: ``"forward"``.
        max_mode: ``"lehmer"`` or ``"naive"`` (the maximum).
        ptp_mode: ``"naive"`` (largest minus smallest), or the share from 0 to 1 of the values in the middle.
        reduce_mode: Mean over samples, ``"attribute"``; over attributes, ``"sample"``; over both, ``"all"``; or
            ``"none"``.
        clamp: Move results into [0, 1].
        p: Power of the Lehmer mean, above 1.

    Returns:
        ``(m,)``, ``(n,)``, a scalar or ``(n, m)``, float64, as numpy or torch, like ``z``.

    Raises:
        ConfigError: Shapes or options that do not fit, NaN, steps that are unequal, or a latent that does not move.

    Example:
        >>> import torch
        >>> z = torch.linspace(0, 1, 5).expand(2, 5)
        >>> smoothness(z, 3 * z + 1)
        tensor([1.], dtype=torch.float64)

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """
    _check_choices(liad_mode=(liad_mode, ("forward",)), max_mode=(max_mode, ("lehmer", "naive")))
    middle = _share(ptp_mode)
    if not p > 1:
        raise ConfigError(f"got p={p!r}; the power of a Lehmer mean is above 1")
    x, y, back = _paths(z, a, reg_dim, least=3, reduce_mode=reduce_mode)
    steps = x.diff(dim=-1)
    step = steps[..., :1]
    if bool(((steps - step).abs() > UNEVEN * step.abs()).any()):
        raise ConfigError("the steps of z along its last axis are unequal; smoothness needs equal steps")
    first = y.diff(dim=-1) / steps
    second = (first.diff(dim=-1) / step).abs()
    bend = second.amax(-1) if max_mode == "naive" else _lehmer(second, p)
    span = first.quantile(0.5 + middle / 2, -1) - first.quantile(0.5 - middle / 2, -1)
    smooth = torch.where(bend == 0, 1.0, 1 - bend / (span / step.squeeze(-1).abs()))
    return back(_reduced(smooth.clamp(0, 1) if clamp else smooth, reduce_mode, Tensor.mean))


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
        ConfigError: Shapes or options that do not fit, NaN, or a latent that does not move.

    Example:
        >>> import torch
        >>> z = torch.linspace(-2, 2, 5).expand(1, 5)
        >>> [monotonicity(z, a).item() for a in (z, -z, z**2)]
        [1.0, -1.0, 0.0]

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """
    _check_choices(liad_mode=(liad_mode, ("forward",)))
    if not liad_thresh >= 0:
        raise ConfigError(f"got liad_thresh={liad_thresh!r}; allowed are numbers from 0 on")
    if degenerate_val != degenerate_val and not nanmean and reduce_mode != "none":
        warnings.warn("degenerate_val is NaN and nanmean is False: means may be NaN", stacklevel=2)
    x, y, back = _paths(z, a, reg_dim, least=2, reduce_mode=reduce_mode)
    change = y.diff(dim=-1) / x.diff(dim=-1)
    sign = change.sign() * (change.abs() > liad_thresh)
    count = (sign != 0).sum(-1)
    found = torch.where(count > 0, sign.sum(-1) / count, degenerate_val)
    return back(_reduced(found, reduce_mode, Tensor.nanmean if nanmean else Tensor.mean))


def _paths(
    z: Any, a: Any, reg_dim: Any, least: int, reduce_mode: str
) -> tuple[Tensor, Tensor, Callable[[Tensor], Any]]:
    """Check paths; return the latents that move and the attributes, ``(n, m, t)``, and the way back."""
    _check_choices(reduce_mode=(reduce_mode, REDUCE))
    x, y = tensor("z", z), tensor("a", a)
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
    x = x[:, regularised(reg_dim, m, f) if reg_dim is not None else tuple(range(m))]
    if bool((x.diff(dim=-1) == 0).any()):
        raise ConfigError("z stands still between two places; every step must move the latent dimension")
    return x, y, lambda result: result if isinstance(z, Tensor) else result.numpy()


def _lehmer(x: Float[Tensor, "n m t"], p: float) -> Float[Tensor, "n m"]:
    # Of ratios to the largest, which keeps powers in range.
    most = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    weight = (x / most).pow(p - 1)
    return torch.where(x.amax(-1) > 0, (x * weight).sum(-1) / weight.sum(-1), 0.0)


def _reduced(x: Tensor, mode: str, mean: Callable[..., Tensor]) -> Tensor:
    if mode == "none":
        return x
    return mean(x) if mode == "all" else mean(x, 0 if mode == "attribute" else -1)


def _share(ptp_mode: float | str) -> float:
    if ptp_mode == "naive":
        return 1.0
    if isinstance(ptp_mode, (str, bool)) or not 0 < ptp_mode <= 1:
        raise ConfigError(f"got ptp_mode={ptp_mode!r}; allowed are 'naive' and numbers above 0 up to 1")
    return float(ptp_mode)


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (got, allowed) in choices.items():
        if got not in allowed:
            raise ConfigError(unknown(name, str(got), allowed))
