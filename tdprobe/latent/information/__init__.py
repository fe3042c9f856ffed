"""How much layers tell: about their input, about each other, about one sample and not another."""

from tdprobe.latent.information.curvature import CurvatureEstimator, trajectory_curvature
from tdprobe.latent.information.dime import DimeEstimator
from tdprobe.latent.information.lidar import LidarEstimator
from tdprobe.latent.information.matrix_entropy import MatrixEntropyEstimator
from tdprobe.latent.information.matrix_joint_entropy import MatrixJointEntropyEstimator
from tdprobe.latent.information.matrix_mutual_information import MatrixMutualInformationEstimator
from tdprobe.latent.information.rankme import RankMeEstimator

__all__ = [
    "CurvatureEstimator",
    "DimeEstimator",
    "LidarEstimator",
    "MatrixEntropyEstimator",
    "MatrixJointEntropyEstimator",
    "MatrixMutualInformationEstimator",
    "RankMeEstimator",
    "trajectory_curvature",
]
