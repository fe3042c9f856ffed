"""The simplest probe: the direction from one class mean to the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdprobe.errors import ConfigError


class MeanDifferenceClassifier:
    """Tell two classes by the nearer of their means.

    ``coef = mean_1 - mean_0`` and ``intercept = -(|mean_1|^2 - |mean_0|^2) / 2``: ``coef x + intercept`` is zero
    half-way between the means. Means are taken in float64.

    Args:
        normalize: Divide both by ``|coef|``, unless that is zero: decisions stay the same, and ``coef x +
            intercept`` becomes a distance.

    Example:
        >>> classifier = MeanDifferenceClassifier()
        >>> classifier.fit(np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([0, 1]))
        >>> classifier.coef_, classifier.intercept_
        (array([[1., 0.]]), array([-1.]))

    References:
        Marks, Tegmark 2024, The geometry of truth (mass-mean probing).
    """

    def __init__(self, normalize: bool = True) -> None:
        self._normalize = normalize
        self._coef: np.ndarray | None = None
        self._intercept: np.ndarray | None = None

    @property
    def coef_(self) -> np.ndarray:
        """(1, width) float64; ConfigError before ``fit``."""
        return _fitted(self._coef)

    @property
    def intercept_(self) -> np.ndarray:
        """(1,) float64; ConfigError before ``fit``."""
        return _fitted(self._intercept)

    def fit(self, X: Any, y: Any) -> None:
        """Take the two means.

        Args:
            X: (n, width) array or tensor.
            y: (n,) labels 0 and 1; numbers in between share a row among both classes.

        Raises:
            ConfigError: ``y`` has more than one axis, another length than ``X``, other values, or one class
                only.
        """
        rows, weights = _array(X), _array(y)
        if weights.ndim > 1:
            raise ConfigError(f"y has shape {weights.shape}; a mean difference is between two classes, labelled (n,)")
        if len(weights) != len(rows):
            raise ConfigError(f"there are {len(rows)} rows and {len(weights)} labels; give one label per row")
        if not ((weights >= 0) & (weights <= 1)).all():
            raise ConfigError(f"labels are 0 and 1, got {weights[~((weights >= 0) & (weights <= 1))][0]:g}")
        if not weights.sum() or not (1 - weights).sum():
            raise ConfigError("both classes must be present in y: labels 0 and 1, got only one of them")
        one = weights @ rows / weights.sum()
        zero = (1 - weights) @ rows / (1 - weights).sum()
        coef = one - zero
        # The product form: a difference of squared lengths would lose its digits far from the origin.
        intercept = -coef @ (one + zero) / 2
        length = np.linalg.norm(coef) if self._normalize else 1.0
        length = length if length > 0 else 1.0
        self._coef, self._intercept = (coef / length).reshape(1, -1), (intercept / length).reshape(1)

    def predict(self, X: Any) -> Any:
        """Return (n,) bool, true for class 1; a tensor for a tensor, otherwise an array."""
        decision = self._decision(X) > 0
        return torch.from_numpy(decision).to(X.device) if isinstance(X, Tensor) else decision

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the logistic function of -/+ (coef x + intercept), (n, 2) float64."""
        half = np.tanh(self._decision(X) / 2) / 2
        return np.stack([0.5 - half, 0.5 + half], axis=1)

    def _decision(self, X: Any) -> np.ndarray:
        return _array(X) @ self.coef_[0] + self.intercept_


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _fitted(value: np.ndarray | None) -> np.ndarray:
    if value is None:
        raise ConfigError("the MeanDifferenceClassifier is not fitted; call fit(X, y) first")
    return value
