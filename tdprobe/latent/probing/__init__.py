"""Probes: small models that say what can be read from an activation."""

from __future__ import annotations

from tdprobe.latent.probing.context import Probing
from tdprobe.latent.probing.estimators import (
    BilinearEstimator,
    LinearEstimator,
    LowRankBilinearEstimator,
    MeanDifferenceClassifier,
    TorchEstimator,
)
from tdprobe.latent.probing.managers import BilinearProbe, BilinearProbeManager, Probe, ProbeManager

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
