"""Modularity: whether a latent dimension knows of one attribute only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.latent.attribute_inputs import K, read
from tdprobe.latent.disentanglement.information import Information


def modularity(z: Any, a: Any, reg_dim: Any = None, discrete: Any = False, thresh: float = 1e-12) -> Any:
    """Compute the modularity of each latent dimension.

    ``1 - sum_{i != j} I(a_i, z_d)^2 / (I(a_j, z_d)^2 (m - 1))`` with j the attribute that the dimension knows most of:
    1 if it knows of one attribute only, 0 if of all alike.

    Args:
        z: Latents ``(n, f)``, numpy or torch, n of 4 or more.
        a: Attributes ``(n, m)``, m from 2 to f.
        reg_dim: Checked, and not used.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        thresh: A dimension with less mutual information than that, in nats, knows of no attribute: 0.

    Returns:
        ``(f,)`` float64, as numpy or torch, like ``z``.

    Raises:
        ConfigError: As in `mig`; and fewer than 2 attributes.

    Example:
        >>> import torch
        >>> z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> found = modularity(z, torch.stack([z[:, 0] + z[:, 1], z[:, 1]], 1))
        >>> bool(found[0] > 0.99), bool(found[1] < found[0])
        (True, True)

    References:
        Ridgeway, Mozer 2018, Learning deep disentangled embeddings with the F-statistic loss.
    """
    if not thresh >= 0:
        raise ConfigError(f"got thresh={thresh!r}; allowed are numbers from 0 on, in nats")
    found = read(z, a, reg_dim, discrete, attributes=2)
    return found.back(modularity_of(Information(found.a, found.discrete, K).latent(found.z), thresh))


def modularity_of(matrix: Float[Tensor, "f m"], thresh: float = 1e-12) -> Float[Tensor, " f"]:
    """Compute the modularity of each latent dimension from mutual information."""
    most = matrix.amax(1, keepdim=True)
    others = (matrix / most).square().sum(1) - 1
    return torch.where(most.squeeze(1) > thresh, 1 - others / (matrix.shape[1] - 1), 0.0)
