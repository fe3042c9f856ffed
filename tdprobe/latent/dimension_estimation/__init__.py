"""How many numbers it takes to tell the samples of a representation apart."""

from tdprobe.latent.dimension_estimation.local_knn import LocalKnnDimensionEstimator
from tdprobe.latent.dimension_estimation.twonn import TwoNnDimensionEstimator

__all__ = ["LocalKnnDimensionEstimator", "TwoNnDimensionEstimator"]
