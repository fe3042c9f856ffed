"""Compare checkpoints layer by layer."""

from tdprobe.compare.layer_list import LayerInfo, list_layers
from tdprobe.compare.layers import compare_layers
from tdprobe.compare.saved import SavedRows
from tdprobe.compare.sweep import LayerComparison

__all__ = ["LayerComparison", "LayerInfo", "SavedRows", "compare_layers", "list_layers"]
