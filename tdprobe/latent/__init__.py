"""Methods on latent activations: caching, scoring, similarity."""

from __future__ import annotations

from tdprobe._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "tdprobe.latent.activation_caching": ["ActivationCaching"],
        "tdprobe.latent.activation_patching": ["ActivationPatching"],
        "tdprobe.latent.attention_patterns": ["AttentionPatterns"],
        "tdprobe.latent.dimension_estimation": [
            "CorrelationDimensionEstimator",
            "EffectiveRankEstimator",
            "GrideDimensionEstimator",
            "LocalKnnDimensionEstimator",
            "LocalPcaDimensionEstimator",
            "MleDimensionEstimator",
            "ParticipationRatioEstimator",
            "TwoNnDimensionEstimator",
        ],
        "tdprobe.latent.information": [
            "CurvatureEstimator",
            "DimeEstimator",
            "LidarEstimator",
            "MatrixEntropyEstimator",
            "MatrixJointEntropyEstimator",
            "MatrixMutualInformationEstimator",
            "RankMeEstimator",
            "trajectory_curvature",
        ],
        "tdprobe.latent.max_activating": ["MaxActivating"],
        "tdprobe.latent.probing": [
            "BilinearEstimator",
            "BilinearProbe",
            "BilinearProbeManager",
            "LinearEstimator",
            "LowRankBilinearEstimator",
            "MeanDifferenceClassifier",
            "Probe",
            "ProbeManager",
            "Probing",
            "TorchEstimator",
        ],
        "tdprobe.latent.representation_similarity": [
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
        ],
        "tdprobe.latent.scoring": ["LayerScoring"],
        "tdprobe.latent.steering_vectors": ["ActivationAddition", "SteeringDirection", "SteeringVectors"],
    },
)
