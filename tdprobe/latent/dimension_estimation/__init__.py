"""How many numbers it takes to tell the samples of a representation apart."""

from tdprobe.latent.dimension_estimation.corr_int import CorrelationDimensionEstimator
from tdprobe.latent.dimension_estimation.effective_rank import EffectiveRankEstimator
from tdprobe.latent.dimension_estimation.gride import GrideDimensionEstimator
from tdprobe.latent.dimension_estimation.local_knn import LocalKnnDimensionEstimator
from tdprobe.latent.dimension_estimation.local_pca import LocalPcaDimensionEstimator
from tdprobe.latent.dimension_estimation.mle import MleDimensionEstimator
from tdprobe.latent.dimension_estimation.participation_ratio import ParticipationRatioEstimator
from tdprobe.latent.dimension_estimation.twonn import TwoNnDimensionEstimator

__all__ = [
    "CorrelationDimensionEstimator",
    "EffectiveRankEstimator",
    "GrideDimensionEstimator",
    "LocalKnnDimensionEstimator",
    "LocalPcaDimensionEstimator",
    "MleDimensionEstimator",
    "ParticipationRatioEstimator",
    "TwoNnDimensionEstimator",
]
