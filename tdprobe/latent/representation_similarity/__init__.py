"""How similar two representations of the same samples are."""

from tdprobe.latent.representation_similarity.cka import CkaEstimator, cka_matrix
from tdprobe.latent.representation_similarity.information_imbalance import InformationImbalanceEstimator

__all__ = ["CkaEstimator", "InformationImbalanceEstimator", "cka_matrix"]
