"""Look inside live neural networks: cache activations, score every pair of layers, compare checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdprobe._lazy import lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "tdprobe.compare.layers": ["compare_layers"],
        "tdprobe.compare.sweep": ["LayerComparison"],
        "tdprobe.compare.layer_list": ["list_layers"],
        "tdprobe.latent.activation_addition": ["ActivationAddition"],
        "tdprobe.latent.activation_caching": ["ActivationCaching"],
        "tdprobe.latent.activation_patching": ["ActivationPatching"],
        "tdprobe.latent.probing": ["Probing"],
        "tdprobe.latent.steering_vectors": ["SteeringVectors"],
        "tdprobe.latent.scoring": ["LayerScoring"],
        "tdprobe.latent.representation_similarity.cka": ["CkaEstimator"],
        "tdprobe.tables": ["ScoreTable"],
        "tdprobe.errors": ["TdprobeError"],
    },
    modules=["compare", "contexts", "errors", "hf", "hooks", "latent", "modules", "registry", "stats", "tables", "viz"],
)

if TYPE_CHECKING:
    from tdprobe.compare import LayerComparison, compare_layers, list_layers
    from tdprobe.errors import TdprobeError
    from tdprobe.latent.activation_addition import ActivationAddition
    from tdprobe.latent.activation_caching import ActivationCaching
    from tdprobe.latent.activation_patching import ActivationPatching
    from tdprobe.latent.probing import Probing
    from tdprobe.latent.representation_similarity.cka import CkaEstimator
    from tdprobe.latent.scoring import LayerScoring
    from tdprobe.latent.steering_vectors import SteeringVectors
    from tdprobe.tables import ScoreTable
