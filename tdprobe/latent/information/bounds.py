"""Bounds of what a noised representation tells about which of its inputs it came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.latent.information.inputs import widened
from tdprobe.latent.information.pair_distances import half_squares, log_volume

# Numbers of one table of (rows, components, features), 64 MB.
TABLE = 2**23


def kolchinsky_tracey_bounds(means: Tensor, stds: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Bound the information between components of a Gaussian mixture and points drawn from it, without any point.

    .. math:: -\sum_i w_i \log \sum_j w_j e^{-B(i, j)} \;\le\; I \;\le\; -\sum_i w_i \log \sum_j w_j e^{-KL(i, j)}

    with the Bhattacharyya distance B and the Kullback-Leibler divergence KL between components. Both lie in
    [0, log k] and meet where components are all alike or far apart.

    Args:
        means: (..., k, features), one component per row: the values before noise.
        stds: Broadcasts to ``means``: the noise. Where all components share it, the work is one product.
        weights: (..., k), not negative, in any unit; equal ones by default. A mean of weight 0 may be NaN.

    Returns:
        The lower and the upper bound in nats, (...), computed in float64; float32 unless an input is float64.

    Raises:
        ConfigError: Shapes that do not fit, no component, a std that is not above 0, or weights that are not weights.

    Example:
        >>> lower, upper = kolchinsky_tracey_bounds(torch.tensor([[0.0], [20.0]]), torch.tensor(1.0))
        >>> torch.allclose(lower, torch.tensor(2.0).log()), torch.allclose(upper, lower)
        (True, True)

    References:
        Kolchinsky, Tracey 2017, Estimating mixture entropy with pairwise distances.
    """
    means, stds = widened(means, stds)
    _check(means, stds)
    dtype = means.dtype
    means, stds = means.double(), stds.double()
    shares = _shares(means, weights)
    common = stds.ndim < 2 or stds.shape[-2] == 1
    if weights is not None:
        # What has no weight may hold anything.
        means = means.masked_fill((shares == 0).unsqueeze(-1), 0)
    distances = (
        _common(means, stds, shares) if common else partial(_distances, means, stds.expand(means.shape).square())
    )
    logs = shares.log().unsqueeze(-2)
    k, found = means.shape[-2], []
    # Without the features where one product takes them in.
    step = max(1, TABLE // max(1, means[..., :, 0].numel() * (1 if common else means.shape[-1])))
    for start in range(0, k, step):
        bounds = [(logs - table).logsumexp(-1) for table in distances(slice(start, start + step))]
        found.append(torch.stack(bounds))
    # A component of weight 0 may be infinitely far from all others.
    terms = torch.where(shares > 0, -torch.cat(found, -1) * shares, 0)
    lower, upper = terms.sum(-1).to(dtype)
    return lower, upper


def _shares(means: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return means.new_full(means.shape[:-1], 1 / means.shape[-2])
    if not isinstance(weights, Tensor) or weights.shape != means.shape[:-1]:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ConfigError(f"weights are {got}; there must be one per component: {tuple(means.shape[:-1])}")
    total = weights.double().sum(-1, keepdim=True)
    if not bool((weights >= 0).all()) or not bool((total > 0).all()) or not bool(total.isfinite().all()):
        raise ConfigError("weights must be finite, none below 0, and not all 0; use 1 for a component that counts")
    return weights.double() / total


def _common(means: Tensor, stds: Tensor, shares: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
    x = means / stds
    # Distances do not depend on the origin; the digits of their expansion do.
    x = x - (shares.unsqueeze(-2) @ x)
    squares = x.square().sum(-1)

    def distances(part: slice) -> tuple[Tensor, Tensor]:
        rows = x[..., part, :]
        both = squares[..., part].unsqueeze(-1) + squares.unsqueeze(-2)
        table = (both - 2 * rows @ x.mT).clamp(min=0)
        return table / 8, table / 2

    return distances


def _distances(means: Tensor, variances: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    gap = (means[..., part, None, :] - means[..., None, :, :]).square()
    own, other = variances[..., part, None, :], variances[..., None, :, :]
    middle = (own + other) / 2
    bhattacharyya = (gap / middle).sum(-1) / 8 + (middle.log() - (own.log() + other.log()) / 2).sum(-1) / 2
    ratio = own / other
    return bhattacharyya, (ratio - 1 - ratio.log() + gap / other).sum(-1) / 2


def info_nce_bound(means: Tensor, stds: Tensor, samples: Tensor) -> Tensor:
    r"""Bound the information from below, at points whose conditional density is known.

    .. math:: \frac1k \sum_i \log \frac{N_i(y_i)}{\frac1k \sum_j N_j(y_i)} \le \log k

    In expectation over data and noise this is at most the information that the representation has about its input, and
    for the k components themselves it is exactly that.

    Args:
        means: (..., k, features), one component per row.
        stds: Broadcasts to ``means``; not clamped.
        samples: Like ``means``; row i is drawn from component i.

    Returns:
        Nats, (...); float32, or float64 if an input is. Differentiable.

    Raises:
        ConfigError: Shapes that do not fit, or no component.

    Example:
        >>> y = torch.tensor([[0.0], [20.0]])
        >>> round(info_nce_bound(y, torch.tensor(1.0), y).item(), 4)  # log 2
        0.6931

    References:
        van den Oord et al. 2018, Representation learning with contrastive predictive coding.
        Poole et al. 2019, On variational bounds of mutual information (known conditional).
    """
    logs = _log_densities(means, stds, samples)
    own = logs.diagonal(dim1=-2, dim2=-1)
    return (own - logs.logsumexp(-1)).mean(-1) + math.log(logs.shape[-1])


def leave_one_out_bound(means: Tensor, stds: Tensor, samples: Tensor) -> Tensor:
    r"""Bound the information from above, at points whose conditional density is known.

    .. math:: \frac1k \sum_i \log \frac{N_i(y_i)}{\frac1{k-1} \sum_{j \ne i} N_j(y_i)}

    In expectation over data and noise; there is no limit such as log k.

    Args:
        means: (..., k, features), one component per row, 2 or more.
        stds: Broadcasts to ``means``; not clamped.
        samples: Like ``means``; row i is drawn from component i.

    Returns:
        Nats, (...); float32, or float64 if an input is. Differentiable.

    Raises:
        ConfigError: Shapes that do not fit, or fewer than two components.

    Example:
        >>> y = torch.tensor([[0.0], [2.0]])
        >>> leave_one_out_bound(y, torch.tensor(1.0), y).item()  # half the squared distance
        2.0

    References:
        Poole et al. 2019, On variational bounds of mutual information.
    """
    logs = _log_densities(means, stds, samples)
    k = logs.shape[-1]
    if k < 2:
        raise ConfigError("got 1 component; leaving one out takes two or more")
    own = logs.diagonal(dim1=-2, dim2=-1)
    others = logs.masked_fill(torch.eye(k, dtype=torch.bool, device=logs.device), -torch.inf)
    return (own - others.logsumexp(-1)).mean(-1) + math.log(k - 1)


def _log_densities(means: Tensor, stds: Tensor, samples: Tensor) -> Tensor:
    """Return ``log N_j(y_i)`` without its constant, (..., i, j)."""
    means, stds, samples = widened(means, stds, samples)
    _check(means, stds, positive=False)
    if samples.shape != means.shape:
        raise ConfigError(
            f"samples have shape {tuple(samples.shape)} and means {tuple(means.shape)}; row i of the samples is drawn "
            "from component i, so both must be the same"
        )
    k, width, lead = *means.shape[-2:], means.shape[:-2]
    # Data sets in the place of tokens: (k, sets, features).
    y, x, sigma = (t.reshape(-1, k, width).transpose(0, 1) for t in (samples, means, stds.expand(means.shape)))
    keep = torch.ones(k, k, x.shape[1], dtype=torch.bool, device=x.device)
    nothing = x.new_zeros(()).expand(x.shape)
    logs = -half_squares(y, x, nothing, sigma, keep, "loop") - log_volume(sigma, keep[0])
    return logs.permute(2, 0, 1).reshape(*lead, k, k)


def _check(means: Tensor, stds: Tensor, positive: bool = True) -> None:
    if means.ndim < 2 or means.shape[-2] == 0:
        raise ConfigError(f"means have shape {tuple(means.shape)}; they must be (..., k, features), k of 1 or more")
    try:
        fits = torch.broadcast_shapes(means.shape, stds.shape) == means.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ConfigError(f"stds have shape {tuple(stds.shape)}; they must broadcast to {tuple(means.shape)}")
    if positive and not bool((stds > 0).all()):
        raise ConfigError("stds must all be above 0: without noise, whatever differs can be told apart")
