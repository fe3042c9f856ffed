"""One matrix of mutual information for each layer, worked out once for all estimators that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdprobe.latent.attribute_bank import by_layer
from tdprobe.latent.attribute_inputs import K
from tdprobe.latent.disentanglement.gaps import Gaps
from tdprobe.latent.disentanglement.information import Information, information
from tdprobe.stats.reservoir import ReservoirState
from tdprobe.stats.state import Derivation, layer_list


@dataclass(frozen=True)
class GapTable:
    """Hold the mutual information of each layer with the attributes.

    Attributes:
        n: Rows behind it.
        lead: Leading dimensions.
        layers: For each layer and data set its `Gaps`; ``None`` for a layer that is not finite.
    """

    n: Tensor
    lead: tuple[int, ...]
    layers: tuple[tuple[Gaps | None, ...], ...]


@dataclass(frozen=True)
class SharedInformation(Derivation):
    """Say that every layer's matrix of mutual information is to be worked out, once for all estimators.

    Args:
        targets: How many of the state's last tensors are attributes.
        discrete: Which attributes are discrete: one bool, or one for each.
        binned: Whether continuous attributes are cut into bins.
    """

    targets: int
    discrete: bool | tuple[bool, ...]
    binned: bool

    def joined(self, other: Any) -> SharedInformation | None:
        """Share with an equal one."""
        return self if self == other else None

    def __call__(self, state: ReservoirState) -> GapTable:
        """Work the matrices out."""

        def prepared(a: Tensor, discrete: tuple[bool, ...]) -> Information:
            return information(a, discrete, self.binned, K)

        def work(z: Tensor, known: Information) -> Gaps:
            return Gaps(known, known.latent(z), None, True)

        lead = layer_list(state.rows)[0].shape[:-2]
        return GapTable(state.n, tuple(lead), by_layer(state, self.targets, self.discrete, prepared, work))
