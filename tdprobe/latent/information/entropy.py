"""The entropy functions of noised embeddings, under one roof."""

from __future__ import annotations

from tdprobe.latent.information.gaussian_mixture import gaussian_mixture_entropy, square_mahalanobis_distance
from tdprobe.latent.information.mutual_information import mutual_information_sub_batch

__all__ = ["gaussian_mixture_entropy", "mutual_information_sub_batch", "square_mahalanobis_distance"]
