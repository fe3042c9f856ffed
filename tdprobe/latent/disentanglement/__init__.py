"""Whether single dimensions of a representation carry single attributes of the samples."""

from tdprobe.latent.disentanglement.dci import dci
from tdprobe.latent.disentanglement.dci_estimator import DciEstimator
from tdprobe.latent.disentanglement.gap_estimators import DligEstimator, DmigEstimator, MigEstimator, XmigEstimator
from tdprobe.latent.disentanglement.information import mutual_information
from tdprobe.latent.disentanglement.interpolation import monotonicity, smoothness
from tdprobe.latent.disentanglement.modularity import modularity
from tdprobe.latent.disentanglement.mutual_info import dependency_aware, dlig, dmig, mig, xmig
from tdprobe.latent.disentanglement.path_estimators import MonotonicityEstimator, SmoothnessEstimator
from tdprobe.latent.disentanglement.sap import sap
from tdprobe.latent.disentanglement.unit_estimators import ModularityEstimator, SapEstimator

__all__ = [
    "DciEstimator",
    "DligEstimator",
    "DmigEstimator",
    "MigEstimator",
    "ModularityEstimator",
    "MonotonicityEstimator",
    "SapEstimator",
    "SmoothnessEstimator",
    "XmigEstimator",
    "dci",
    "dependency_aware",
    "dlig",
    "dmig",
    "mig",
    "modularity",
    "monotonicity",
    "mutual_information",
    "sap",
    "smoothness",
    "xmig",
]
