"""How similar two representations of the same samples are."""

from tdprobe.latent.representation_similarity.cca import CcaEstimator
from tdprobe.latent.representation_similarity.cka import CkaEstimator, cka_matrix
from tdprobe.latent.representation_similarity.cknna import CknnaEstimator
from tdprobe.latent.representation_similarity.distance_correlation import DistanceCorrelationEstimator
from tdprobe.latent.representation_similarity.gulp import GulpEstimator
from tdprobe.latent.representation_similarity.information_imbalance import InformationImbalanceEstimator
from tdprobe.latent.representation_similarity.jaccard import JaccardEstimator
from tdprobe.latent.representation_similarity.linear_regression import LinearRegressionEstimator
from tdprobe.latent.representation_similarity.mutual_knn import MutualKnnEstimator
from tdprobe.latent.representation_similarity.procrustes import ProcrustesEstimator
from tdprobe.latent.representation_similarity.pwcca import PwccaEstimator
from tdprobe.latent.representation_similarity.rank_similarity import RankSimilarityEstimator
from tdprobe.latent.representation_similarity.rsa import RsaEstimator
from tdprobe.latent.representation_similarity.second_order_cosine import SecondOrderCosineEstimator
from tdprobe.latent.representation_similarity.svcca import SvccaEstimator

__all__ = [
    "CcaEstimator",
    "CkaEstimator",
    "CknnaEstimator",
    "DistanceCorrelationEstimator",
    "GulpEstimator",
    "InformationImbalanceEstimator",
    "JaccardEstimator",
    "LinearRegressionEstimator",
    "MutualKnnEstimator",
    "ProcrustesEstimator",
    "PwccaEstimator",
    "RankSimilarityEstimator",
    "RsaEstimator",
    "SecondOrderCosineEstimator",
    "SvccaEstimator",
    "cka_matrix",
]
