"""Plain versions of the entropy functions, term by term, and batches to try them on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MAHALANOBIS = "gaussian_mixture_mahalanobis_distance_loss"
LOG_CONSTANTS = "gaussian_mixture_log_constants_and_determinant_loss"
ASSIGNMENT = "gaussian_mixture_assignment_entropy_loss"
ENTROPY = "gaussian_mixture_entropy_loss"
STD_LOG = "std_log_loss"
MUTUAL_INFORMATION = "mutual_information_loss"


def batch(size: int = 6, tokens: int = 4, width: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Return means, stds, mask, clean and noisy, with some tokens masked and every row partly kept."""
    g = torch.Generator().manual_seed(seed)
    clean, means, noise = torch.randn(3, size, tokens, width, generator=g, dtype=torch.float64)
    stds = 0.3 + torch.rand(size, tokens, width, generator=g, dtype=torch.float64)
    mask = torch.rand(size, tokens, generator=g) > 0.3
    mask[:, 0] = True
    found = (means, stds, clean, clean + means + stds * noise)
    means, stds, clean, noisy = (x.to(dtype) for x in found)
    return means, stds, mask, clean, noisy


def entropy_by_definition(clean: Tensor, y: Tensor, means: Tensor, stds: Tensor, keep: Tensor, mixture: bool) -> Tensor:
    """Average minus the log density, one triple after the other; ``keep`` is (b, n, tokens)."""
    values = []
    for i, s in {(int(i), int(s)) for i, _, s in keep.nonzero()}:
        used = keep[i, :, s].nonzero()[:, 0].tolist()
        logs = [torch.distributions.Normal(clean[k, s] + means[k, s], stds[k, s]).log_prob(y[i, s]) for k in used]
        terms = torch.stack(logs).sum(-1)
        joint = terms.exp().mean().log() if mixture else terms.mean()
        values += [-joint] * len(used)
    return torch.stack(values).mean()


def information_by_definition(given: Any, combine: bool = True, mixture: bool = False) -> Tensor:
    """Subtract the mean analytic entropy of the own component."""
    (_, m2), (s1, s2), (k1, k2), (_, x2), (y1, _) = (x.chunk(2) for x in given)
    keep = k1[:, None] & (k2 if combine else torch.ones_like(k2))[None]
    own = (s1.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    weight = keep.sum(1)
    return entropy_by_definition(x2, y1, m2, s2, keep, mixture) - (own * weight).sum() / weight.sum()
