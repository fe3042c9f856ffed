"""What latents and attributes must be, and the way back to the kind of array that they came as."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdprobe.errors import ConfigError

# Neighbours that the estimates of mutual information count.
K = 3


@dataclass(frozen=True)
class Inputs:
    """Hold latents and attributes that go together.

    Attributes:
        z: ``(n, f)`` float64.
        a: ``(n, m)`` float64; discrete ones as numbers 0, 1, ... of their classes.
        discrete: Which attributes are discrete, one per attribute.
        reg_dim: The latent dimension that belongs to each attribute, or ``None``.
        from_numpy: Whether results are to be numpy arrays.
    """

    z: Tensor
    a: Tensor
    discrete: tuple[bool, ...]
    reg_dim: tuple[int, ...] | None
    from_numpy: bool

    def back(self, result: Tensor) -> Any:
        """Return a result as the kind of array that the latents were."""
        return result.numpy() if self.from_numpy else result


def read(
    z: Any,
    a: Any,
    reg_dim: Any = None,
    discrete: Any = False,
    *,
    fill: bool = False,
    dims: int = 1,
    attributes: int = 1,
    wide: bool = True,
    names: tuple[str, str] = ("z", "a"),
) -> Inputs:
    """Check latents and attributes.

    Args:
        z: ``(n, f)``.
        a: ``(n,)`` or ``(n, m)``.
        reg_dim: Any sequence of m different numbers below f, or ``None``.
        discrete: One bool, or one per attribute.
        fill: Let ``reg_dim`` be 0, 1, ..., m - 1 by default.
        dims: Least number of latent dimensions.
        attributes: Least number of attributes.
        wide: Ask for at least as many features as attributes.
        names: What the caller's arguments are called.

    Raises:
        ConfigError: Anything else.
    """
    (of_z, of_a), from_numpy = names, not isinstance(z, Tensor)
    z, a = tensor(of_z, z), tensor(of_a, a)
    if z.ndim != 2:
        raise ConfigError(f"{of_z} has shape {tuple(z.shape)}; it must be (samples, features)")
    if a.ndim not in (1, 2):
        raise ConfigError(f"{of_a} has shape {tuple(a.shape)}; it must be (samples,) or (samples, attributes)")
    a = a.to(z.device) if a.ndim == 2 else a.to(z.device).unsqueeze(1)
    if len(a) != len(z):
        raise ConfigError(f"{of_z} has {len(z)} samples and {of_a} has {len(a)}; every sample needs both")
    (n, f), m = z.shape, a.shape[1]
    if m < attributes:
        raise ConfigError(
            f"{of_a} has {m} attributes; needed are {attributes} or more, as columns of {of_a} (samples, attributes)"
        )
    if f < (least := max(m * wide, dims)):
        raise ConfigError(f"{of_z} has {f} features and {of_a} has {m} attributes; needed are {least} features or more")
    if n <= K:
        raise ConfigError(f"got {n} samples; the estimate counts {K} neighbours and needs at least {K + 1} samples")
    flags = flags_of(discrete, m)
    _require_finite(of_z, z)
    _require_finite(of_a, a)
    found = regularised(reg_dim, m, f) if reg_dim is not None else tuple(range(m)) if fill else None
    return Inputs(z, classes(a, flags), flags, found, from_numpy)


def tensor(name: str, x: Any) -> Tensor:
    """Return an array as a float64 tensor without gradient."""
    return real(name, x).double()


def real(name: str, x: Any) -> Tensor:
    """Return an array as a tensor without gradient, in the precision that it has."""
    try:
        found = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is a {type(x).__name__} that is no array of numbers: {error}") from error
    if found.is_complex():
        raise ConfigError(f"{name} is complex; pass real and imaginary parts as columns")
    return found


def regularised(reg_dim: Any, m: int, f: int) -> tuple[int, ...]:
    """Check a sequence of latent dimensions.

    Raises:
        ConfigError: They are not m different integers from 0 to f - 1.
    """
    reg_dim = reg_dim.cpu() if isinstance(reg_dim, Tensor) else reg_dim
    plain = isinstance(reg_dim, Iterable) and not hasattr(reg_dim, "__array__")
    found = np.asarray(list(reg_dim) if plain else reg_dim)
    allowed = f"allowed are {m} different integers from 0 to {f - 1}, one per attribute"
    if found.shape != (m,):
        raise ConfigError(f"reg_dim has shape {found.shape}; {allowed}")
    if found.dtype.kind not in "iu":
        raise ConfigError(f"reg_dim holds {found.tolist()}; {allowed}")
    if found.min() < 0 or found.max() >= f or len(set(found.tolist())) < m:
        raise ConfigError(f"reg_dim is {found.tolist()}; {allowed}")
    return tuple(found.tolist())


def flags_of(discrete: Any, m: int) -> tuple[bool, ...]:
    """Return for each of m attributes whether it is discrete.

    Raises:
        ConfigError: It is neither one bool nor one for each.
    """
    if isinstance(discrete, (bool, np.bool_)):
        return (bool(discrete),) * m
    found = list(discrete) if isinstance(discrete, (Sequence, np.ndarray, Tensor)) else [discrete]
    if len(found) != m or not all(isinstance(flag, (bool, np.bool_)) or _is_bool(flag) for flag in found):
        raise ConfigError(f"got discrete={discrete!r}; allowed are a bool, or one bool for each of {m} attributes")
    return tuple(map(bool, found))


def _is_bool(flag: Any) -> bool:
    return isinstance(flag, Tensor) and flag.dtype == torch.bool and flag.ndim == 0


def _require_finite(name: str, x: Tensor) -> None:
    bad = (~x.isfinite()).any(0).nonzero().squeeze(-1).tolist()
    if bad:
        raise ConfigError(
            f"{name} holds NaN or infinite values in columns {bad[:10]}; leave these samples or columns out"
        )


def warn_of_nan(scores: Iterable[Tensor], why: str) -> None:
    """Name the attributes for which any of some scores, ``(m,)`` each, is NaN."""
    bad = sorted({i for score in scores for i in score.isnan().nonzero().squeeze(-1).tolist()})
    if bad:
        named = ", ".join(f"attribute {i}" for i in bad)
        warnings.warn(f"{named}: the score is NaN, for {why}", stacklevel=4)


def classes(a: Tensor, discrete: Sequence[bool]) -> Tensor:
    """Number the classes of the discrete attributes.

    Raises:
        ConfigError: A label is no integer.
    """
    a = a.clone()
    for i, column in enumerate(a.unbind(1)):
        if not discrete[i]:
            continue
        odd = column[column != column.round()]
        if len(odd):
            raise ConfigError(
                f"attribute {i} holds {odd[0].item():g}, but discrete attributes are integer labels; number the "
                "classes, or pass discrete=False"
            )
        a[:, i] = column.unique(return_inverse=True)[1].double()
    return a
