"""How many numbers it takes to tell the samples of a representation apart."""

from tdprobe.latent.dimension_estimation.effective_rank import EffectiveRankEstimator
from tdprobe.latent.dimension_estimation.local_knn import LocalKnnDimensionEstimator
from tdprobe.latent.dimension_estimation.participation_ratio import ParticipationRatioEstimator
from tdprobe.latent.dimension_estimation.twonn import TwoNnDimensionEstimator

__all__ = [
    "EffectiveRankEstimator",
    "LocalKnnDimensionEstimator",
    "ParticipationRatioEstimator",
    "TwoNnDimensionEstimator",
]
