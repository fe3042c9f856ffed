"""Probes and their managers, under the path by which the documented API knows them."""

from __future__ import annotations

from tdprobe.latent.probing.bilinear_manager import BilinearProbeManager
from tdprobe.latent.probing.probe_manager import ProbeManager
from tdprobe.latent.probing.probes import BilinearProbe, Probe

__all__ = ["BilinearProbe", "BilinearProbeManager", "Probe", "ProbeManager"]
