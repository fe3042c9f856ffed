"""Modularity and SAP as estimators."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.latent.attribute_bank import AttributeEstimator, by_layer
from tdprobe.latent.attribute_inputs import Inputs
from tdprobe.latent.disentanglement.gaps import latent_gap
from tdprobe.latent.disentanglement.modularity import modularity_of
from tdprobe.latent.disentanglement.sap import predictability
from tdprobe.latent.disentanglement.shared_information import GapTable, SharedInformation
from tdprobe.registry import Spec, register
from tdprobe.stats.state import layer_list

INVARIANCES = frozenset({"permutation", "isotropic scaling", "translation"})


@register(
    Spec(
        name="modularity",
        kind="supervised",
        symmetric=False,
        bounds=(0.0, 1.0),
        larger_means="units that know of a single attribute",
        invariant_to=INVARIANCES,
        needs=("reservoir",),
        cost="n^1.5 d m per layer, for a bank of n rows",
        reference="Ridgeway, Mozer 2018, Learning deep disentangled embeddings with the F-statistic loss",
    )
)
class ModularityEstimator(AttributeEstimator):
    """Score whether the units of a layer know of a single attribute each: the mean of `modularity`.

    Units count by the mutual information that they have with their attribute: most units of a wide layer know next to
    nothing, and of what chance gives them one attribute is always the largest.

    Args:
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)``, m of 2 or more; or a list of keys.
        out_key: Key to write, ``(*lead, 1)`` float32.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Example:
        >>> import torch
        >>> z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> td = ModularityEstimator()(TensorDict({"latents": z, "attributes": z}))
        >>> bool(td["modularity"] > 0.95)
        True

    References:
        Ridgeway, Mozer 2018, Learning deep disentangled embeddings with the F-statistic loss.
    """

    least_attributes, least_units = 2, 1

    def __init__(
        self,
        in_key: Any = "latents",
        attributes: Any = "attributes",
        out_key: Any = "modularity",
        *,
        discrete: Any = False,
        bank_size: int = 4096,
    ) -> None:
        super().__init__(in_key, attributes, out_key, discrete, bank_size)

    def target_names(self, count: int) -> tuple[str, ...]:
        """Name the one column after all attributes."""
        return (", ".join(map(str, self.target_keys)),)

    def derivation(self, state: Any) -> SharedInformation:
        """Ask for the mutual information of every unit with every attribute."""
        return SharedInformation(len(self.target_keys), self._discrete, False)

    def score(self, state: Any) -> TensorDict:
        """Score each layer of a `ReservoirState` or `GapTable`.

        Returns:
            ``"score"``, ``(*lead, l, 1)`` float64, and ``"finite"``.
        """
        table = state if isinstance(state, GapTable) else self.derivation(state)(state)
        layers = [[None if held is None else self._mean(held.matrix) for held in layer] for layer in table.layers]
        return self._table(layers, table.lead)

    def _mean(self, matrix: Tensor) -> Tensor:
        self._check(*matrix.shape)
        most = matrix.amax(1)
        return ((modularity_of(matrix) * most).sum() / most.sum()).reshape(1)


@register(
    Spec(
        name="sap",
        kind="supervised",
        symmetric=False,
        bounds=(0.0, 1.0),
        larger_means="more of an attribute in a single unit",
        invariant_to=INVARIANCES,
        needs=("reservoir",),
        cost="n d m per layer; a classifier for each unit and discrete attribute",
        reference="Kumar et al. 2018, Variational inference of disentangled latent concepts",
    )
)
class SapEstimator(AttributeEstimator):
    """Score whether a single unit predicts each attribute, see `sap`.

    Args:
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        out_key: Key to write, ``(*lead, m)`` float32.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        l2_reg: ``C`` of the classifier of discrete attributes.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Example:
        >>> import torch
        >>> z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> td = SapEstimator()(TensorDict({"latents": z, "attributes": 2 * z[:, 1] - 3}))
        >>> bool(td["sap"] > 0.95)
        True

    References:
        Kumar, Sattigeri, Balakrishnan 2018, Variational inference of disentangled latent concepts from unlabeled
        observations.
    """

    def __init__(
        self,
        in_key: Any = "latents",
        attributes: Any = "attributes",
        out_key: Any = "sap",
        *,
        discrete: Any = False,
        l2_reg: float = 1.0,
        bank_size: int = 4096,
    ) -> None:
        super().__init__(in_key, attributes, out_key, discrete, bank_size)
        if not l2_reg > 0:
            raise ConfigError(f"got l2_reg={l2_reg!r}; allowed are numbers above 0")
        self.l2_reg = l2_reg

    def score(self, state: Any) -> TensorDict:
        """Score each layer of a `ReservoirState`.

        Returns:
            ``"score"``, ``(*lead, l, m)`` float64, and ``"finite"``.
        """

        def work(z: Tensor, known: tuple[Tensor, tuple[bool, ...]]) -> Tensor:
            self._check(z.shape[1], known[0].shape[1])
            return latent_gap(predictability(Inputs(z, *known, None, False), self.l2_reg), None)

        found = by_layer(state, len(self.target_keys), self._discrete, lambda *known: known, work)
        return self._table(found, layer_list(state.rows)[0].shape[:-2])
