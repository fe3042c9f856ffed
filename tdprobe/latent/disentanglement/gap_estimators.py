"""The MIG family and modularity as estimators, on one matrix of mutual information per layer."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.latent.attribute_bank import AttributeEstimator
from tdprobe.latent.attribute_inputs import regularised
from tdprobe.latent.disentanglement.gaps import Gaps, best_dims, check_normalizer
from tdprobe.latent.disentanglement.shared_information import GapTable, SharedInformation
from tdprobe.registry import Spec, register

COST = "n^1.5 d m per layer, for a bank of n rows"
INVARIANCES = frozenset({"permutation", "isotropic scaling", "translation"})


def _spec(name: str, means: str, bounds: tuple[float, float], reference: str) -> Spec:
    return Spec(name, "supervised", False, bounds, means, INVARIANCES, ("reservoir",), COST, reference)


class _GapEstimator(AttributeEstimator):
    """Score each attribute by a gap.

    Args:
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        out_key: Key to write, ``(*lead, m)`` float32.
        reg_dim: Unit of each attribute: m different numbers, ``"best"`` (the most informative one that no other
            attribute took before), or ``None`` where a gap needs none.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        normalizer: As in `mig`.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
    """

    def __init__(
        self,
        in_key: Any,
        attributes: Any,
        out_key: Any,
        reg_dim: Any,
        discrete: Any,
        normalizer: str,
        bank_size: int,
    ) -> None:
        super().__init__(in_key, attributes, out_key, discrete, bank_size)
        check_normalizer(normalizer)
        if isinstance(reg_dim, str) and reg_dim != "best":
            raise ConfigError(f"got reg_dim={reg_dim!r}; allowed are 'best', and one unit for each attribute")
        self.reg_dim, self.normalizer = reg_dim, normalizer

    def derivation(self, state: Any) -> SharedInformation:
        """Ask for the mutual information of every unit with every attribute."""
        return SharedInformation(len(self.target_keys), self._discrete, self.normalizer == "binned")

    def score(self, state: Any) -> TensorDict:
        """Score each layer.

        Args:
            state: `ReservoirState` or `GapTable`.

        Returns:
            ``"score"``, ``(*lead, l, m)`` float64, and ``"finite"``.

        Raises:
            ConfigError: Fewer than 4 rows, too few units or attributes, or attributes that are not finite.
        """
        table = state if isinstance(state, GapTable) else self.derivation(state)(state)
        found = [[None if held is None else self._scored(held) for held in layer] for layer in table.layers]
        return self._table(found, table.lead)

    def _scored(self, held: Gaps) -> Tensor:
        d, m = held.matrix.shape
        self._check(d, m)
        if self.reg_dim is None:
            return self._gap(replace(held, normalize=self.normalizer != "none"))
        best = isinstance(self.reg_dim, str)
        dims = best_dims(held.matrix) if best else regularised(self.reg_dim, m, d)
        return self._gap(replace(held, reg_dim=dims, normalize=self.normalizer != "none"))

    @abstractmethod
    def _gap(self, held: Gaps) -> Tensor:
        """Score one layer of one data set, ``(m,)``."""


@register(
    _spec(
        "mig",
        "more of an attribute in a single unit",
        (0.0, 1.0),
        "Chen et al. 2018, Isolating sources of disentanglement in variational autoencoders",
    )
)
class MigEstimator(_GapEstimator):
    """Score whether each attribute is in a single unit of a layer: the mutual information gap, see `mig`.

    Args:
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        out_key: Key to write, ``(*lead, m)`` float32.
        reg_dim: ``None``, ``"best"``, or the unit of each attribute.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        normalizer: ``"ksg"``, ``"binned"`` or ``"none"``, see `mig`.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Example:
        >>> import torch
        >>> z = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> td = MigEstimator()(TensorDict({"latents": z, "attributes": z[:, :2]}))
        >>> bool((td["mig"] > 0.9).all())
        True

    References:
        Chen, Li, Grosse, Duvenaud 2018, Isolating sources of disentanglement in variational autoencoders.
    """

    def __init__(
        self,
        in_key: Any = "latents",
        attributes: Any = "attributes",
        out_key: Any = "mig",
        reg_dim: Any = None,
        *,
        discrete: Any = False,
        normalizer: str = "ksg",
        bank_size: int = 4096,
    ) -> None:
        super().__init__(in_key, attributes, out_key, reg_dim, discrete, normalizer, bank_size)

    def _gap(self, held: Gaps) -> Tensor:
        return held.mig()


class _OwnUnitEstimator(_GapEstimator):
    """Give every attribute a unit of its own, by default the best."""

    def __init__(
        self,
        in_key: Any = "latents",
        attributes: Any = "attributes",
        out_key: Any = None,
        reg_dim: Any = "best",
        *,
        discrete: Any = False,
        normalizer: str = "ksg",
        bank_size: int = 4096,
    ) -> None:
        if reg_dim is None:
            raise ConfigError("got reg_dim=None; allowed are 'best', and one unit for each attribute")
        out_key = self.spec.name if out_key is None else out_key
        super().__init__(in_key, attributes, out_key, reg_dim, discrete, normalizer, bank_size)


@register(
    _spec(
        "dmig",
        "more of an attribute in a single unit",
        (-math.inf, math.inf),
        "Watcharasupat, Lerch 2021, Evaluation of latent space disentanglement in the presence of interdependent "
        "attributes",
    )
)
class DmigEstimator(_OwnUnitEstimator):
    """Score as `MigEstimator` does, allowing for attributes that depend on each other, see `dmig`.

    Takes the arguments of `MigEstimator`; ``reg_dim`` is ``"best"`` by default and cannot be ``None``.

    Example:
        >>> import torch
        >>> z = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> td = DmigEstimator()(TensorDict({"latents": z, "attributes": z[:, :2]}))
        >>> bool((td["dmig"] > 0.9).all())
        True

    References:
        Watcharasupat, Lerch 2021, Evaluation of latent space disentanglement in the presence of interdependent
        attributes.
    """

    def _gap(self, held: Gaps) -> Tensor:
        return held.dmig()


@register(
    _spec(
        "dlig",
        "units that know of a single attribute",
        (-math.inf, 1.0),
        "Watcharasupat 2021, Controllable music: supervised learning of disentangled representations",
    )
)
class DligEstimator(_OwnUnitEstimator):
    """Score whether the unit of each attribute knows of no other attribute, see `dlig`.

    Takes the arguments of `MigEstimator`; ``reg_dim`` is ``"best"`` by default and cannot be ``None``.

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """

    least_attributes = 2

    def _gap(self, held: Gaps) -> Tensor:
        return held.dlig()


@register(
    _spec(
        "xmig",
        "less of an attribute in units without one",
        (-1.0, 1.0),
        "Watcharasupat 2021, Controllable music: supervised learning of disentangled representations",
    )
)
class XmigEstimator(_OwnUnitEstimator):
    """Score the gap to units that belong to no attribute, see `xmig`.

    Takes the arguments of `MigEstimator`; ``reg_dim`` is ``"best"`` by default and cannot be ``None``.

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """

    def _check(self, d: int, m: int) -> None:
        super()._check(d, m)
        if d <= m:
            raise ConfigError(f"xmig got a layer of {d} units and {m} attributes; needed are {m + 1} units or more")

    def _gap(self, held: Gaps) -> Tensor:
        return held.xmig()
