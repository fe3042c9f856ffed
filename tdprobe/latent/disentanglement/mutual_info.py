"""Gaps of mutual information between latents and attributes: MIG, DMIG, DLIG, XMIG."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.latent.attribute_inputs import Inputs, K, read, warn_of_nan
from tdprobe.latent.disentanglement.gaps import Gaps, gaps

__all__ = ["dependency_aware", "dlig", "dmig", "mig", "xmig"]


def mig(
    z: Any, a: Any, reg_dim: Any = None, discrete: Any = False, fill_reg_dim: bool = False, *, normalizer: str = "ksg"
) -> Any:
    """Compute the mutual information gap of each attribute.

    ``(I(a_i, z_j) - I(a_i, z_k)) / H(a_i)`` with j the most and k the second most informative latent dimension: near
    the largest possible value if one dimension alone knows the attribute, 0 if two know it equally well. With
    ``reg_dim``, j is ``reg_dim[i]`` and k the best other one, and the gap may be negative.

    With ``normalizer="ksg"`` the entropy of a continuous attribute is what the estimator says of the attribute and
    itself, ``psi(n) - psi(4)`` without repeated values. That grows with n: compare scores at equal n only.
    ``"binned"`` cuts continuous attributes into 20 bins of equal counts and treats them as discrete: then the score
    estimates a number between 0 and 1 that does not depend on n. ``"none"`` gives the gap itself, in nats.

    Args:
        z: Latents ``(n, f)``, numpy or torch, n of 4 or more, f of 2 or more; computed in float64, without gradient.
        a: Attributes ``(n,)`` or ``(n, m)`` with m at most f.
        reg_dim: Latent dimension that is to encode each attribute, m different numbers below f.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        fill_reg_dim: Let ``reg_dim`` be 0, 1, ..., m - 1 by default.
        normalizer: ``"ksg"``, ``"binned"`` or ``"none"``.

    Returns:
        ``(m,)`` float64, as numpy or torch, like ``z``; NaN, with a warning, for an attribute without entropy.

    Raises:
        ConfigError: Shapes that do not fit, fewer samples than 4, NaN or infinite values, labels that are no integers,
            a ``reg_dim`` that does not fit, or an unknown normalizer.

    Example:
        >>> import torch
        >>> z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> alone, shared = mig(z, torch.stack([z[:, 0], z[:, 1] + z[:, 2]], 1), normalizer="binned")
        >>> bool(alone > 0.9), bool(shared < 0.1)
        (True, True)

    References:
        Chen, Li, Grosse, Duvenaud 2018, Isolating sources of disentanglement in variational autoencoders.
    """
    found = read(z, a, reg_dim, discrete, fill=fill_reg_dim, dims=2)
    return _finished(found, {"mig": _gaps(found, normalizer).mig()})["mig"]


def dmig(z: Any, a: Any, reg_dim: Any = None, discrete: Any = False, *, normalizer: str = "ksg") -> Any:
    """Compute the dependency-aware mutual information gap of each attribute.

    ``(I(a_i, z_j) - I(a_i, z_k)) / H(a_i | a_l)`` with j the dimension of the attribute, k the best other one, and a_l
    the attribute that k encodes; if it encodes none, the entropy is ``H(a_i)``. An attribute that depends on others
    cannot reach a large gap; that is what the conditional entropy makes up for.

    Args:
        z: As in `mig`.
        a: As in `mig`.
        reg_dim: As in `mig`; by default 0, 1, ..., m - 1.
        discrete: As in `mig`.
        normalizer: As in `mig`.

    Returns:
        ``(m,)``, as in `mig`.

    Raises:
        ConfigError: As in `mig`.

    Example:
        >>> import torch
        >>> z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> a = torch.stack([z[:, 0], z[:, 0] + z[:, 1]], 1)
        >>> plain, aware = mig(z, a, [1, 0]), dmig(z, a, [1, 0])
        >>> bool((aware.abs() > 1.05 * plain.abs()).all())
        True

    References:
        Watcharasupat, Lerch 2021, Evaluation of latent space disentanglement in the presence of interdependent
        attributes.
    """
    found = read(z, a, reg_dim, discrete, fill=True, dims=2)
    return _finished(found, {"dmig": _gaps(found, normalizer).dmig()})["dmig"]


def dlig(z: Any, a: Any, reg_dim: Any = None, discrete: Any = False, *, normalizer: str = "ksg") -> Any:
    """Compute the dependency-aware latent information gap of each dimension that encodes an attribute.

    ``(I(a_i, z_d) - I(a_j, z_d)) / H(a_i | a_j)`` with d the dimension of attribute i and a_j the other attribute that
    d knows most of: negative where d knows more of another attribute than of its own.

    Args:
        z: As in `mig`.
        a: As in `mig`, m of 2 or more.
        reg_dim: As in `mig`; by default 0, 1, ..., m - 1.
        discrete: As in `mig`.
        normalizer: As in `mig`.

    Returns:
        ``(m,)``, one for each entry of ``reg_dim``, as in `mig`.

    Raises:
        ConfigError: As in `mig`; and fewer than 2 attributes.

    Example:
        >>> import torch
        >>> z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> own, swapped = dlig(z, z), dlig(z, z, reg_dim=[1, 0])
        >>> bool((own > 0.9).all()), bool((swapped < -0.9).all())
        (True, True)

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """
    found = read(z, a, reg_dim, discrete, fill=True, attributes=2)
    dims = found.reg_dim or ()
    # Only these dimensions count.
    wanted = gaps(found.z[:, dims], found.a, found.discrete, tuple(range(len(dims))), normalizer, K)
    return _finished(found, {"dlig": wanted.dlig()})["dlig"]


def xmig(z: Any, a: Any, reg_dim: Any = None, discrete: Any = False, *, normalizer: str = "ksg") -> Any:
    """Compute the dependency-blind mutual information gap of each attribute.

    ``(I(a_i, z_j) - I(a_i, z_k)) / H(a_i)`` with j the dimension of the attribute and k the best of those that encode
    no attribute.

    Args:
        z: As in `mig`, with more features than attributes.
        a: As in `mig`.
        reg_dim: As in `mig`; by default 0, 1, ..., m - 1.
        discrete: As in `mig`.
        normalizer: As in `mig`.

    Returns:
        ``(m,)``, as in `mig`.

    Raises:
        ConfigError: As in `mig`; and no more features than attributes.

    Example:
        >>> import torch
        >>> z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> known, lost = xmig(z, z[:, [0, 2]])
        >>> bool(known > 0.9), bool(lost < -0.9)
        (True, True)

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """
    found = _with_free_dimensions(read(z, a, reg_dim, discrete, fill=True))
    return _finished(found, {"xmig": _gaps(found, normalizer).xmig()})["xmig"]


def dependency_aware(
    z: Any, a: Any, reg_dim: Any = None, discrete: Any = False, *, normalizer: str = "ksg"
) -> dict[str, Any]:
    """Compute `mig`, `dmig`, `dlig` and `xmig` from one matrix of mutual information.

    Args:
        z: As in `mig`, with more features than attributes.
        a: As in `mig`, m of 2 or more.
        reg_dim: As in `mig`; by default 0, 1, ..., m - 1, for ``mig`` too.
        discrete: As in `mig`.
        normalizer: As in `mig`.

    Returns:
        ``(m,)`` each under ``"mig"``, ``"dmig"``, ``"dlig"`` and ``"xmig"``.

    Raises:
        ConfigError: What one of the four refuses.

    Example:
        >>> import torch
        >>> z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> {name: bool((found > 0.9).all()) for name, found in dependency_aware(z, z[:, :2]).items()}
        {'mig': True, 'dmig': True, 'dlig': True, 'xmig': True}
    """
    found = _with_free_dimensions(read(z, a, reg_dim, discrete, fill=True, attributes=2))
    shared = _gaps(found, normalizer)
    return _finished(found, {name: getattr(shared, name)() for name in ("mig", "dmig", "dlig", "xmig")})


def _gaps(found: Inputs, normalizer: str) -> Gaps:
    return gaps(found.z, found.a, found.discrete, found.reg_dim, normalizer, K)


def _with_free_dimensions(found: Inputs) -> Inputs:
    f, m = found.z.shape[1], found.a.shape[1]
    if f <= m:
        raise ConfigError(
            f"z has {f} features and a has {m} attributes; the gap to dimensions without an attribute needs {m + 1} "
            "features or more"
        )
    return found


def _finished(found: Inputs, scores: dict[str, Tensor]) -> dict[str, Any]:
    warn_of_nan(scores.values(), "no entropy is left to divide by; it is constant, or another attribute determines it")
    return {name: found.back(score) for name, score in scores.items()}
