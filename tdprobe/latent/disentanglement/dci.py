"""DCI: disentanglement, completeness and informativeness, from how models use latents to predict attributes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.attribute_inputs import Inputs, read, warn_of_nan

MODELS = ("lasso", "forest", "boosting")
# Samples on which informativeness is measured.
HELD_OUT = 0.25


def dci(
    z: Any, a: Any, discrete: Any = False, *, model: str = "lasso", alpha: float = 0.01, seed: int = 0
) -> dict[str, Any]:
    """Compute disentanglement, completeness and informativeness.

    A model per attribute predicts it from all latents; ``R_di`` says how much the model of attribute i uses latent d.
    With ``P_di = R_di / sum_i R_di`` the disentanglement of latent d is ``1 - H(P_d) / log m``: 1 if it serves one
    attribute. Latents count by their share of all importance. Completeness of attribute i is the same along the
    latents, ``1 - H(R_i / sum_d R_di) / log f``: 1 if one latent serves it. Informativeness is how well the model
    predicts a quarter of the samples that it was not fitted to.

    Args:
        z: Latents ``(n, f)``, numpy or torch, f of 2 or more, n of 8 or more.
        a: Attributes ``(n, m)``, m of 2 or more.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        model: ``"lasso"`` (sparse linear regression, for labels of a column of 0 and 1 per class; importance by the
            size of the coefficients), ``"forest"`` or ``"boosting"`` (trees; their own importance).
        alpha: Strength of the penalty of ``"lasso"``, for standardised latents and attributes.
        seed: Of the split and of the trees.

    Returns:
        By name, as numpy or torch, like ``z``, float64: ``"disentanglement"`` and ``"completeness"``, scalars;
        ``"informativeness"`` ``(m,)``, R^2 or accuracy; ``"by_latent"`` ``(f,)``; ``"by_attribute"`` ``(m,)``;
        ``"importance"`` ``(f, m)``. An attribute that is constant has NaN, with a warning, and counts nowhere else;
        a latent that no model uses has disentanglement NaN, and counts for nothing.

    Raises:
        ConfigError: Inputs that do not fit, as in `mig` (but f may be smaller than m), or an unknown model.

    Example:
        >>> import torch
        >>> z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> found = dci(z, z[:, :2])
        >>> [round(float(found[name]), 2) for name in ("disentanglement", "completeness")]
        [1.0, 1.0]

    References:
        Eastwood, Williams 2018, A framework for the quantitative evaluation of disentangled representations.
    """
    if model not in MODELS:
        raise ConfigError(unknown("model", str(model), MODELS))
    if not alpha > 0:
        raise ConfigError(f"got alpha={alpha!r}; allowed are numbers above 0")
    found = read(z, a, None, discrete, dims=2, attributes=2, wide=False)
    if len(found.z) < 8:
        raise ConfigError(f"got {len(found.z)} samples; dci fits models on three quarters of them and needs 8 or more")
    scores = dci_of(*importances(found, model, alpha, seed))
    warn_of_nan([scores["informativeness"]], "the attribute is constant")
    return {name: found.back(score) for name, score in scores.items()}


def dci_of(importance: Float[Tensor, "f m"], informativeness: Float[Tensor, " m"]) -> dict[str, Tensor]:
    """Compute the three scores from importances, NaN in the columns of constant attributes."""
    used = ~importance.isnan().any(0)
    weights = importance[:, used]
    by_latent = 1 - _entropy(weights, 1) / np.log(max(weights.shape[1], 1))
    by_attribute = torch.full_like(informativeness, torch.nan)
    by_attribute[used] = 1 - _entropy(weights, 0) / np.log(len(weights))
    return {
        "disentanglement": _weighted(by_latent, weights.sum(1)),
        "completeness": _weighted(by_attribute[used], weights.sum(0)),
        "informativeness": informativeness,
        "by_latent": by_latent,
        "by_attribute": by_attribute,
        "importance": importance,
    }


def _entropy(weights: Tensor, dim: int) -> Tensor:
    """Compute the entropy along a dimension, NaN where all weights are 0."""
    share = weights / weights.sum(dim, keepdim=True)
    return -torch.xlogy(share, share).sum(dim)


def _weighted(scores: Tensor, weights: Tensor) -> Tensor:
    return (scores.nan_to_num() * weights).sum() / weights.sum()


def importances(found: Inputs, model: str, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """Fit a model per attribute; return importances ``(f, m)`` and scores on held-out samples ``(m,)``."""
    from sklearn.preprocessing import StandardScaler

    z, a = found.z.cpu().numpy(), found.a.cpu().numpy()
    # By value first, so that the order in which rows came does not matter.
    sorted_ = np.lexsort(np.hstack([z[:, :4], a]).T)
    order = sorted_[np.random.default_rng(seed).permutation(len(z))]
    held, fitted = np.split(order, [max(2, int(HELD_OUT * len(order)))])
    x = StandardScaler().fit(z[fitted]).transform(z)
    importance = found.z.new_full((found.z.shape[1], found.a.shape[1]), torch.nan)
    score = found.z.new_full((found.a.shape[1],), torch.nan)
    for i, discrete in enumerate(found.discrete):
        y = a[:, i]
        if (y[fitted] == y[fitted][0]).all():
            continue
        y = y.astype(int) if discrete else (y - y[fitted].mean()) / y[fitted].std()
        fit = _fit_lasso if model == "lasso" else _fit_trees
        weights, found_score = fit(x, y, fitted, held, discrete=discrete, model=model, alpha=alpha, seed=seed)
        importance[:, i], score[i] = torch.from_numpy(weights), float(found_score)
    return importance, score


def _fit_lasso(
    x: np.ndarray, y: np.ndarray, fitted: np.ndarray, held: np.ndarray, *, discrete: bool, alpha: float, **_: Any
) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import Lasso

    # A column of 0 and 1 for each class.
    target = (y[:, None] == np.unique(y[fitted])) * 1.0 if discrete else y
    fit = Lasso(alpha=alpha, max_iter=10_000).fit(x[fitted], target[fitted])
    weights = np.abs(np.atleast_2d(fit.coef_)).sum(0)
    if not discrete:
        return weights, fit.score(x[held], y[held])
    guess = np.unique(y[fitted])[fit.predict(x[held]).argmax(1)]
    return weights, (guess == y[held]).mean()


def _fit_trees(
    x: np.ndarray,
    y: np.ndarray,
    fitted: np.ndarray,
    held: np.ndarray,
    *,
    discrete: bool,
    model: str,
    seed: int,
    **_: Any,
) -> tuple[np.ndarray, float]:
    from sklearn import ensemble

    name = {"forest": "RandomForest", "boosting": "GradientBoosting"}[model]
    fit = getattr(ensemble, name + ("Classifier" if discrete else "Regressor"))(random_state=seed)
    fit.fit(x[fitted], y[fitted])
    return fit.feature_importances_, fit.score(x[held], y[held])
