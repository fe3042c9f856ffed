from tdprobe.latent.representation_similarity.cca import CcaEstimator as CcaEstimator
from tdprobe.latent.representation_similarity.cka import CkaEstimator as CkaEstimator
from tdprobe.latent.representation_similarity.cka import cka_matrix as cka_matrix
from tdprobe.latent.representation_similarity.cknna import CknnaEstimator as CknnaEstimator
from tdprobe.latent.representation_similarity.distance_correlation import (
    DistanceCorrelationEstimator as DistanceCorrelationEstimator,
)
from tdprobe.latent.representation_similarity.gulp import GulpEstimator as GulpEstimator
from tdprobe.latent.representation_similarity.information_imbalance import (
    InformationImbalanceEstimator as InformationImbalanceEstimator,
)
from tdprobe.latent.representation_similarity.jaccard import JaccardEstimator as JaccardEstimator
from tdprobe.latent.representation_similarity.linear_regression import (
    LinearRegressionEstimator as LinearRegressionEstimator,
)
from tdprobe.latent.representation_similarity.mutual_knn import MutualKnnEstimator as MutualKnnEstimator
from tdprobe.latent.representation_similarity.procrustes import ProcrustesEstimator as ProcrustesEstimator
from tdprobe.latent.representation_similarity.pwcca import PwccaEstimator as PwccaEstimator
from tdprobe.latent.representation_similarity.rank_similarity import RankSimilarityEstimator as RankSimilarityEstimator
from tdprobe.latent.representation_similarity.rsa import RsaEstimator as RsaEstimator
from tdprobe.latent.representation_similarity.second_order_cosine import (
    SecondOrderCosineEstimator as SecondOrderCosineEstimator,
)
from tdprobe.latent.representation_similarity.svcca import SvccaEstimator as SvccaEstimator
