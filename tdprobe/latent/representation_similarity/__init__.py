"""How similar two representations of the same samples are."""

from tdprobe.latent.representation_similarity.cka import CkaEstimator, cka_matrix

__all__ = ["CkaEstimator", "cka_matrix"]
