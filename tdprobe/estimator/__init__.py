"""The contract of every estimator: config that turns a state into scores."""

from tdprobe.estimator.base import Estimator, LayerEstimator, PairEstimator
from tdprobe.estimator.scores import not_finite, repeated_rows, score_all, warn_not_finite, warn_repeated
from tdprobe.estimator.supervised import SupervisedEstimator

__all__ = [
    "Estimator",
    "LayerEstimator",
    "PairEstimator",
    "SupervisedEstimator",
    "not_finite",
    "repeated_rows",
    "score_all",
    "warn_not_finite",
    "warn_repeated",
]
