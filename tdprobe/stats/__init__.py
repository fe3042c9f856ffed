"""Bounded, mergeable summaries of a stream of rows: what it leaves behind, and what estimators read."""

from tdprobe.stats.cross import Cross
from tdprobe.stats.cross_state import CrossState
from tdprobe.stats.gram import Gram, GramState, gram_products
from tdprobe.stats.group_moments import GroupMoments, GroupMomentsState
from tdprobe.stats.jackknife import jackknife_se, mean_se
from tdprobe.stats.joint_entropy import JointEntropy, JointEntropyTable
from tdprobe.stats.kernels import Kernel, Kernels, KernelTable
from tdprobe.stats.moments import Moments, MomentsState
from tdprobe.stats.neighbors import Neighbors, NeighborTable
from tdprobe.stats.paths import PathMeasure, Paths, PathsState
from tdprobe.stats.reservoir import Reservoir, ReservoirState
from tdprobe.stats.saved import SavedState, load_state, read_state, save_state
from tdprobe.stats.spectrum import Spectrum, SpectrumTable, renyi_entropy
from tdprobe.stats.state import Derivation, State, Statistic, layer_list
from tdprobe.stats.turns import Turns, TurnsState

__all__ = [
    "Cross",
    "CrossState",
    "Derivation",
    "Gram",
    "GramState",
    "GroupMoments",
    "GroupMomentsState",
    "JointEntropy",
    "JointEntropyTable",
    "Kernel",
    "KernelTable",
    "Kernels",
    "Moments",
    "MomentsState",
    "NeighborTable",
    "Neighbors",
    "PathMeasure",
    "Paths",
    "PathsState",
    "Reservoir",
    "ReservoirState",
    "SavedState",
    "Spectrum",
    "SpectrumTable",
    "State",
    "Statistic",
    "Turns",
    "TurnsState",
    "gram_products",
    "jackknife_se",
    "layer_list",
    "load_state",
    "mean_se",
    "read_state",
    "save_state",
    "renyi_entropy",
]
