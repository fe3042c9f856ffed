"""Entropy of Gaussian mixtures and mutual information of noised embeddings, by Monte Carlo over a batch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tdprobe._types import Bool, Float
from tdprobe.errors import ConfigError
from tdprobe.latent.information.inputs import Losses, check_choice, check_components, kept, widened, write_losses
from tdprobe.latent.information.pair_distances import half_squares, log_volume

MAHALANOBIS = "gaussian_mixture_mahalanobis_distance_loss"
LOG_CONSTANTS = "gaussian_mixture_log_constants_and_determinant_loss"
ASSIGNMENT = "gaussian_mixture_assignment_entropy_loss"

ESTIMATORS, METHODS = ("pairwise", "mixture"), ("loop", "matmul")
REDUCTIONS = ("mean", "sum", "none")
Pairing = Literal["pairwise", "mixture"]
Method = Literal["loop", "matmul"]


def square_mahalanobis_distance(
    x: Tensor, y: Tensor, stds: Tensor, mask: Tensor, *, reduction: Literal["mean", "sum", "none"] = "mean"
) -> Tensor:
    r"""Compute half the squared distance in units of the standard deviations, per token.

    .. math:: \tfrac12 \sum_e \left(\frac{x_e - y_e}{\sigma_e}\right)^2

    Args:
        x: Broadcasts with ``y`` and ``stds`` to (..., tokens, features), real.
        y: The other side.
        stds: Standard deviations.
        mask: Broadcasts to (..., tokens); nonzero means keep. Values elsewhere do not matter, NaN included.
        reduction: ``"mean"`` over kept tokens (0 if there is none), ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or (..., tokens) with 0 at masked tokens; float32, or float64 if an input is.

    Raises:
        ConfigError: Shapes that do not broadcast, or an unknown reduction.

    Example:
        >>> square_mahalanobis_distance(torch.ones(3, 4), torch.zeros(3, 4), torch.tensor(0.5), torch.ones(3))
        tensor(8.)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    x, y, stds = widened(x, y, stds)
    tokens = _broadcast_tokens(x, y, stds)
    try:
        keep = ((mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device=x.device)) != 0).expand(tokens)
    except RuntimeError:
        raise ConfigError(f"mask has shape {tuple(mask.shape)}; it must broadcast to {tuple(tokens)}") from None
    hole = ~keep.unsqueeze(-1)
    # Filled before the arithmetic: the gradient of NaN or infinity is NaN however small its weight.
    scaled = (x - y).masked_fill(hole, 0) / torch.where(hole, torch.ones_like(stds), stds)
    distances = 0.5 * scaled.square().sum(-1)
    if reduction == "none":
        return distances
    return distances.sum() / keep.sum().to(distances).clamp(min=1) if reduction == "mean" else distances.sum()


def _broadcast_tokens(x: Tensor, y: Tensor, stds: Tensor) -> torch.Size:
    shapes = tuple(x.shape), tuple(y.shape), tuple(stds.shape)
    try:
        shape = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ConfigError("x, y and stds have shapes {}, {} and {}, which do not broadcast".format(*shapes)) from None
    if not shape:
        raise ConfigError("x, y and stds are all scalars; one of them must have features: (..., tokens, features)")
    return shape[:-1]


def gaussian_mixture_entropy(
    clean_embeddings: Tensor,
    transformed_embeddings: Tensor,
    means: Tensor,
    stds: Tensor,
    mask: Tensor,
    losses: Losses = None,
    *,
    estimator: Pairing = "pairwise",
    method: Method = "loop",
) -> Tensor:
    r"""Estimate the entropy of a Gaussian mixture from points drawn from it.

    Per token, with components :math:`N_l = N(x_l + \mu_l, \sigma_l^2)`, averaged over points :math:`y_i`:

    .. math:: \text{pairwise: } -\frac1n \sum_l \log N_l(y_i) \qquad
        \text{mixture: } -\log \frac1n \sum_l N_l(y_i)

    The pairwise value is an upper bound, the mean cross-entropy to single components; the mixture value is the Monte
    Carlo entropy itself.

    Args:
        clean_embeddings: x, (n, tokens, features), another batch than the transformed ones.
        transformed_embeddings: y, (b, tokens, features).
        means: mu, like ``clean_embeddings``: where noise moves them.
        stds: sigma, like ``clean_embeddings``; not clamped: 0 gives an infinity or NaN.
        mask: (b, tokens) of the transformed embeddings, or (b, n, tokens) of pairs; nonzero means keep. Values at
            positions that no kept pair uses do not matter.
        losses: Takes the parts, in nats: ``gaussian_mixture_mahalanobis_distance_loss``,
            ``gaussian_mixture_log_constants_and_determinant_loss``, and with ``"mixture"`` also
            ``gaussian_mixture_assignment_entropy_loss``, from 0 to log n. They add up to the value.
        estimator: ``"pairwise"`` or ``"mixture"``.
        method: ``"loop"`` over components, exact; ``"matmul"`` expands the square, which is faster and loses digits
            where stds are small beside the spread of the embeddings.

    Returns:
        Nats per token, a scalar: the mean over kept triples (point, component, token), 0 without any. Float32, or
        float64 if an input is.

    Raises:
        ConfigError: Shapes that do not fit, or an unknown option.

    Example:
        >>> y = torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(0))
        >>> zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        >>> h = gaussian_mixture_entropy(zero, y, zero, one, torch.ones(4000, 1))
        >>> abs(h.item() - 0.5 * math.log(2 * math.pi * math.e)) < 0.05
        True

    References:
        Huber et al. 2008, On entropy approximation for Gaussian mixture random vectors.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("method", method, METHODS)
    clean, y, means, stds = widened(clean_embeddings, transformed_embeddings, means, stds)
    check_components(clean, {"means": means, "stds": stds}, "clean_embeddings")
    if y.ndim != 3 or y.shape[1:] != clean.shape[1:]:
        raise ConfigError(
            f"transformed_embeddings has shape {tuple(y.shape)} and clean_embeddings {tuple(clean.shape)}; both are "
            "(batch, tokens, features), with the same tokens and features"
        )
    (b, tokens, _), n = y.shape, clean.shape[0]
    if n == 0:
        raise ConfigError("clean_embeddings has a batch of 0, so the mixture has no component; give at least one")
    keep = kept(mask, (b, tokens), "mask", (b, n, tokens))
    keep = keep if keep.ndim == 3 else keep.unsqueeze(1).expand(b, n, tokens)
    with torch.autocast(y.device.type, enabled=False):
        value, parts = mixture_parts(clean, y, means, stds, keep, estimator, method)
    write_losses(losses, parts)
    return value


def mixture_parts(
    clean: Float[Tensor, "n s e"],
    y: Float[Tensor, "b s e"],
    means: Float[Tensor, "n s e"],
    stds: Float[Tensor, "n s e"],
    keep: Bool[Tensor, "b n s"],
    estimator: Pairing,
    method: Method,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the entropy and its parts; see `gaussian_mixture_entropy`."""
    squares = half_squares(y, clean, means, stds, keep, method)
    constants = log_volume(stds, keep.any(0)) + 0.5 * y.shape[-1] * math.log(2 * math.pi)
    total = keep.sum().to(y.dtype).clamp(min=1)
    if estimator == "pairwise":
        parts = {
            MAHALANOBIS: squares.sum() / total,
            LOG_CONSTANTS: (constants * keep.sum(0).to(y.dtype)).sum() / total,
        }
        return sum(parts.values(), start=y.new_zeros(())), parts
    count = keep.sum(1).to(y.dtype)
    # A token without any component has no weight; its value must be a number all the same.
    nothing = torch.where(keep.any(1, keepdim=True), -torch.inf, 0.0)
    logits = torch.where(keep, -squares - constants, nothing.to(y.dtype))
    joint = logits.logsumexp(1)
    log_share = logits - joint.unsqueeze(1)
    share = log_share.exp() * (count / total).unsqueeze(1)
    logarithm = count.clamp(min=1).log()
    # Not the sum of its parts: in their gradients terms as large as the distances cancel.
    value = ((logarithm - joint) * count).sum() / total
    used = torch.where(keep, log_share, 0)
    assignment = (logarithm * count).sum() / total + (share * used).sum()
    parts = {MAHALANOBIS: (share * squares).sum(), LOG_CONSTANTS: (share * constants).sum(), ASSIGNMENT: assignment}
    return value, parts
