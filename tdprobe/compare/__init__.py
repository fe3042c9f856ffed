"""Compare checkpoints layer by layer."""

from tdprobe.compare.layer_list import LayerInfo, list_layers
from tdprobe.compare.sweep import LayerComparison, compare_layers

__all__ = ["LayerComparison", "LayerInfo", "compare_layers", "list_layers"]
