"""Separate attribute predictability: whether one latent dimension predicts an attribute better than all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.latent.attribute_inputs import Inputs, read, warn_of_nan
from tdprobe.latent.disentanglement.gaps import latent_gap


def sap(z: Any, a: Any, reg_dim: Any = None, discrete: Any = False, l2_reg: float = 1.0, thresh: float = 1e-12) -> Any:
    """Compute the gap in predictability of each attribute.

    The score of the best latent dimension minus that of the second best (with ``reg_dim``: of the given one minus the
    best other), where the score is the squared correlation for a continuous attribute, and the accuracy of a linear
    support vector classifier, on the samples it was fitted to, for a discrete one.

    Args:
        z: Latents ``(n, f)``, numpy or torch, f of 2 or more.
        a: Attributes ``(n,)`` or ``(n, m)`` with m at most f.
        reg_dim: Latent dimension that is to encode each attribute, m different numbers below f.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        l2_reg: ``C`` of the classifier: smaller is more regularised.
        thresh: A latent dimension with at most this variance predicts nothing (continuous attributes).

    Returns:
        ``(m,)`` float64, as numpy or torch, like ``z``; NaN, with a warning, for a constant attribute.

    Raises:
        ConfigError: As in `mig`; and an ``l2_reg`` or ``thresh`` that makes no sense.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 1.0], [1.0, -1.0], [2.0, -1.0], [3.0, 1.0]])
        >>> sap(z, 5 - z[:, 0])
        tensor([1.], dtype=torch.float64)

    References:
        Kumar, Sattigeri, Balakrishnan 2018, Variational inference of disentangled latent concepts from unlabeled
        observations.
    """
    if not l2_reg > 0 or not thresh >= 0:
        raise ConfigError(f"got l2_reg={l2_reg!r} and thresh={thresh!r}; allowed are l2_reg above 0, thresh from 0 on")
    found = read(z, a, reg_dim, discrete, dims=2)
    score = latent_gap(predictability(found, l2_reg, thresh), found.reg_dim)
    warn_of_nan([score], "the attribute is constant")
    return found.back(score)


def predictability(found: Inputs, l2_reg: float = 1.0, thresh: float = 1e-12) -> Float[Tensor, "f m"]:
    """Score every latent dimension as a predictor of every attribute; NaN for constant attributes."""
    scores = squared_correlation(found.z, found.a, thresh)
    for i in [i for i, flag in enumerate(found.discrete) if flag]:
        scores[:, i] = _accuracies(found.z, found.a[:, i].long(), l2_reg)
    return scores


def squared_correlation(z: Float[Tensor, "n f"], a: Float[Tensor, "n m"], thresh: float) -> Float[Tensor, "f m"]:
    """Compute squared correlations, 0 for columns of z with at most a variance, NaN for constant columns of a."""
    u, v = z - z.mean(0), a - a.mean(0)
    constant = (a == a[:1]).all(0)
    silent = z.var(0) <= thresh
    found = (u.mT @ v).square() / (u.square().sum(0).unsqueeze(1) * v.square().sum(0))
    return found.masked_fill(silent.unsqueeze(1), 0.0).masked_fill(constant, torch.nan)


def _accuracies(z: Tensor, labels: Tensor, l2_reg: float) -> Tensor:
    from sklearn.svm import LinearSVC

    if int(labels.max()) == 0:
        return z.new_full((z.shape[1],), torch.nan)
    y = labels.cpu().numpy()
    columns = (column.reshape(-1, 1).cpu().numpy() for column in z.unbind(1))
    # The solver shuffles: a seed of its own makes the result a function of the data.
    found = [LinearSVC(C=l2_reg, random_state=0).fit(column, y).score(column, y) for column in columns]
    return z.new_tensor(found)
