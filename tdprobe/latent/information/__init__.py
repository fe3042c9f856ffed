"""How much layers tell: about their input, about each other, about one sample and not another, and through noise."""

from tdprobe.latent.information.bounds import info_nce_bound, kolchinsky_tracey_bounds, leave_one_out_bound
from tdprobe.latent.information.curvature import CurvatureEstimator, trajectory_curvature
from tdprobe.latent.information.dime import DimeEstimator
from tdprobe.latent.information.entropy import (
    gaussian_mixture_entropy,
    mutual_information_sub_batch,
    square_mahalanobis_distance,
)
from tdprobe.latent.information.ksg import KsgEstimator, ksg_mutual_information
from tdprobe.latent.information.lidar import LidarEstimator
from tdprobe.latent.information.matrix_entropy import MatrixEntropyEstimator
from tdprobe.latent.information.matrix_joint_entropy import MatrixJointEntropyEstimator
from tdprobe.latent.information.matrix_mutual_information import MatrixMutualInformationEstimator
from tdprobe.latent.information.mdl import Codelength, MdlEstimator, online_codelength
from tdprobe.latent.information.modules import (
    GaussianMixtureEntropy,
    MutualInformationSubBatch,
    SquareMahalanobisDistance,
)
from tdprobe.latent.information.noised_estimator import NoisedInformationEstimator
from tdprobe.latent.information.noised_information import NoisedInformation
from tdprobe.latent.information.rankme import RankMeEstimator
from tdprobe.latent.information.usable import VInformationEstimator, pointwise_v_information, v_information

__all__ = [
    "Codelength",
    "CurvatureEstimator",
    "DimeEstimator",
    "GaussianMixtureEntropy",
    "KsgEstimator",
    "LidarEstimator",
    "MatrixEntropyEstimator",
    "MatrixJointEntropyEstimator",
    "MatrixMutualInformationEstimator",
    "MdlEstimator",
    "MutualInformationSubBatch",
    "NoisedInformation",
    "NoisedInformationEstimator",
    "RankMeEstimator",
    "SquareMahalanobisDistance",
    "VInformationEstimator",
    "gaussian_mixture_entropy",
    "info_nce_bound",
    "kolchinsky_tracey_bounds",
    "ksg_mutual_information",
    "leave_one_out_bound",
    "mutual_information_sub_batch",
    "online_codelength",
    "pointwise_v_information",
    "square_mahalanobis_distance",
    "trajectory_curvature",
    "v_information",
]
