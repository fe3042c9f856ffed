"""Probes: small models that say what can be read from an activation."""

from __future__ import annotations

from tdprobe.latent.probing.bilinear_manager import BilinearProbeManager
from tdprobe.latent.probing.context import Probing
from tdprobe.latent.probing.estimators import BilinearEstimator, LinearEstimator, LowRankBilinearEstimator
from tdprobe.latent.probing.managers import ProbeManager
from tdprobe.latent.probing.mean_difference import MeanDifferenceClassifier
from tdprobe.latent.probing.probes import BilinearProbe, Probe
from tdprobe.latent.probing.torch_estimator import TorchEstimator

__all__ = [
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
]
