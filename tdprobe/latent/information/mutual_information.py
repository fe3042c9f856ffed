"""Mutual information between embeddings and their noised versions, between two halves of a batch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tdprobe._types import Bool, Float
from tdprobe.errors import ConfigError
from tdprobe.latent.information.gaussian_mixture import (
    ESTIMATORS,
    METHODS,
    Method,
    Pairing,
    mixture_parts,
    square_mahalanobis_distance,
)
from tdprobe.latent.information.inputs import Losses, check_choice, check_components, kept, widened, write_losses
from tdprobe.latent.information.pair_distances import log_volume

ENTROPY = "gaussian_mixture_entropy_loss"
STD_LOG = "std_log_loss"
MUTUAL_INFORMATION = "mutual_information_loss"
CONDITIONALS = ("analytic", "sampled")


def mutual_information_sub_batch(
    means_tensor: Tensor,
    stds_tensor: Tensor,
    noise_mask: Tensor,
    clean_input_embeddings: Tensor,
    noisy_input_embeddings: Tensor,
    combine_noise_masks_for_mutual_information_sub_batches: bool = True,
    losses: Losses = None,
    *,
    estimator: Pairing = "pairwise",
    conditional: Literal["analytic", "sampled"] = "analytic",
    symmetric: bool = False,
    method: Method = "loop",
) -> Tensor:
    r"""Estimate how many nats noisy embeddings tell about the clean ones.

    The batch is cut in two. Points :math:`y_i` are the noisy embeddings of the first half, the mixture is that of the
    second, :math:`N_l = N(x_l + \mu_l, \sigma_l^2)`:

    .. math:: I = H(Y) - H(Y|X), \qquad H(Y|X) = \sum_e \log \sigma_{ie} + \tfrac12 \log 2 \pi e

    with H(Y) of `gaussian_mixture_entropy`. The default, ``"pairwise"``, is an upper bound to be made small in
    training (CLUB): for a Gaussian channel it expects snr per dimension where the information is
    ``0.5 log(1 + snr)``, and it knows no limit such as log b. ``"mixture"`` is tighter.

    Args:
        means_tensor: mu, (batch, tokens, features).
        stds_tensor: sigma, the same shape; not clamped: 0 gives an infinity or NaN.
        noise_mask: (batch, tokens); nonzero means keep. Values at positions that no kept pair uses do not matter.
        clean_input_embeddings: x, the same shape as ``means_tensor``.
        noisy_input_embeddings: y, drawn from ``N(x + mu, sigma^2)``, the same shape.
        combine_noise_masks_for_mutual_information_sub_batches: Both tokens of a pair must be kept; otherwise that
            of the point only.
        losses: Takes the parts, in nats: those of `gaussian_mixture_entropy`, their sum
            ``gaussian_mixture_entropy_loss``, ``std_log_loss`` (minus H(Y|X)), and the sum of the last two,
            ``mutual_information_loss``.
        estimator: ``"pairwise"`` or ``"mixture"``.
        conditional: ``"analytic"`` H(Y|X), or ``"sampled"`` at the points themselves, whose noise then cancels:
            the same gradients for reparametrised noise, less variance.
        symmetric: Average over both halves as points.
        method: ``"loop"`` or ``"matmul"``; see `gaussian_mixture_entropy`.

    Returns:
        Nats per token, a scalar: the mean over kept triples (point, component, token), 0 without any. Float32, or
        float64 if an input is.

    Raises:
        ConfigError: A batch of less than 2 or of odd size, shapes that differ, or an unknown option.

    Example:
        >>> x = torch.randn(64, 5, 3)
        >>> std, losses = torch.full_like(x, 2.0), {}
        >>> y = x + std * torch.randn_like(x)
        >>> mi = mutual_information_sub_batch(torch.zeros_like(x), std, torch.ones(64, 5), x, y, losses=losses)
        >>> torch.allclose(mi, losses["gaussian_mixture_entropy_loss"] + losses["std_log_loss"])
        True

    References:
        Cheng et al. 2020, CLUB: a contrastive log-ratio upper bound of mutual information.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("conditional", conditional, CONDITIONALS)
    check_choice("method", method, METHODS)
    means, stds, clean, noisy = widened(means_tensor, stds_tensor, clean_input_embeddings, noisy_input_embeddings)
    others = {"noisy_input_embeddings": noisy, "means_tensor": means, "stds_tensor": stds}
    check_components(clean, others, "clean_input_embeddings")
    if clean.shape[0] < 2 or clean.shape[0] % 2:
        raise ConfigError(
            f"the batch has {clean.shape[0]} rows; it is cut into two equal halves, so it needs an even number of "
            "rows, 2 or more: leave one out, or draw batches of even size"
        )
    mask = kept(noise_mask, tuple(clean.shape[:2]), "noise_mask")
    halves = list(zip(*(tensor.chunk(2, 0) for tensor in (means, stds, mask, clean, noisy)), strict=True))
    combine = combine_noise_masks_for_mutual_information_sub_batches
    with torch.autocast(clean.device.type, enabled=False):
        parts = _parts(*halves, combine, estimator, conditional == "sampled", method)
        if symmetric:
            other = _parts(*halves[::-1], combine, estimator, conditional == "sampled", method)
            parts = {name: 0.5 * (value + other[name]) for name, value in parts.items()}
    write_losses(losses, parts)
    return parts[MUTUAL_INFORMATION]


Half = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _parts(
    points: Half, components: Half, combine: bool, estimator: Pairing, sampled: bool, method: Method
) -> dict[str, Tensor]:
    means, stds, mask, clean, noisy = points
    other_means, other_stds, other_mask, other_clean, _ = components
    pairs = mask.unsqueeze(1) & (other_mask if combine else torch.ones_like(other_mask)).unsqueeze(0)
    entropy, parts = mixture_parts(other_clean, noisy, other_means, other_stds, pairs, estimator, method)
    own = _sampled(means, stds, clean, noisy, pairs) if sampled else _analytic(stds, pairs)
    weight = pairs.sum(1).to(noisy.dtype)
    std_log = -(own * weight).sum() / weight.sum().clamp(min=1)
    return {**parts, ENTROPY: entropy, STD_LOG: std_log, MUTUAL_INFORMATION: entropy + std_log}


def _analytic(stds: Float[Tensor, "b s e"], pairs: Bool[Tensor, "b n s"]) -> Float[Tensor, "b s"]:
    return log_volume(stds, pairs.any(1)) + 0.5 * stds.shape[-1] * math.log(2 * math.pi * math.e)


def _sampled(means: Tensor, stds: Tensor, clean: Tensor, noisy: Tensor, pairs: Tensor) -> Tensor:
    used = pairs.any(1)
    # The two parts of the centre one after the other: adding them up first costs digits where the noise is small.
    squares = square_mahalanobis_distance(noisy - clean, means, stds, used, reduction="none")
    return squares + log_volume(stds, used) + 0.5 * stds.shape[-1] * math.log(2 * math.pi)
