"""How similar two representations of the same samples are."""

from __future__ import annotations

from tdprobe._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "tdprobe.latent.representation_similarity.cca": ["CcaEstimator"],
        "tdprobe.latent.representation_similarity.cka": ["CkaEstimator", "cka_matrix"],
        "tdprobe.latent.representation_similarity.cknna": ["CknnaEstimator"],
        "tdprobe.latent.representation_similarity.distance_correlation": ["DistanceCorrelationEstimator"],
        "tdprobe.latent.representation_similarity.gulp": ["GulpEstimator"],
        "tdprobe.latent.representation_similarity.information_imbalance": ["InformationImbalanceEstimator"],
        "tdprobe.latent.representation_similarity.jaccard": ["JaccardEstimator"],
        "tdprobe.latent.representation_similarity.linear_regression": ["LinearRegressionEstimator"],
        "tdprobe.latent.representation_similarity.mutual_knn": ["MutualKnnEstimator"],
        "tdprobe.latent.representation_similarity.procrustes": ["ProcrustesEstimator"],
        "tdprobe.latent.representation_similarity.pwcca": ["PwccaEstimator"],
        "tdprobe.latent.representation_similarity.rank_similarity": ["RankSimilarityEstimator"],
        "tdprobe.latent.representation_similarity.rsa": ["RsaEstimator"],
        "tdprobe.latent.representation_similarity.second_order_cosine": ["SecondOrderCosineEstimator"],
        "tdprobe.latent.representation_similarity.svcca": ["SvccaEstimator"],
    },
)
