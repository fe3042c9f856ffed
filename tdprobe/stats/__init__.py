"""Bounded, mergeable summaries of a stream of rows: what it leaves behind, and what estimators read."""

from __future__ import annotations

from tdprobe._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "tdprobe.stats.cross": ["Cross"],
        "tdprobe.stats.cross_state": ["CrossState"],
        "tdprobe.stats.gram": ["Gram", "GramState", "gram_products"],
        "tdprobe.stats.group_moments": ["GroupMoments", "GroupMomentsState"],
        "tdprobe.stats.jackknife": ["jackknife_se", "mean_se"],
        "tdprobe.stats.joint_entropy": ["JointEntropy", "JointEntropyTable"],
        "tdprobe.stats.kernels": ["Kernel", "Kernels", "KernelTable"],
        "tdprobe.stats.moments": ["Moments", "MomentsState"],
        "tdprobe.stats.neighbors": ["Neighbors", "NeighborTable"],
        "tdprobe.stats.paths": ["PathMeasure", "Paths", "PathsState"],
        "tdprobe.stats.reservoir": ["Reservoir", "ReservoirState"],
        "tdprobe.stats.saved": ["SavedState", "load_state", "read_state", "save_state"],
        "tdprobe.stats.spectrum": ["Spectrum", "SpectrumTable", "renyi_entropy"],
        "tdprobe.stats.state": ["Derivation", "State", "Statistic", "layer_list"],
        "tdprobe.stats.turns": ["Turns", "TurnsState"],
    },
)
