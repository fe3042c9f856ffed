"""DCI as an estimator."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.attribute_bank import AttributeEstimator, by_layer
from tdprobe.latent.attribute_inputs import Inputs
from tdprobe.latent.disentanglement.dci import MODELS, dci_of, importances
from tdprobe.registry import Spec, register
from tdprobe.stats.state import layer_list

MEASURES = ("disentanglement", "completeness", "informativeness")


@register(
    Spec(
        name="dci",
        kind="supervised",
        symmetric=False,
        bounds=(0.0, 1.0),
        larger_means="units that serve a single attribute",
        invariant_to=frozenset({"isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="a regression per layer and attribute, n d^2 or so",
        reference="Eastwood, Williams 2018, Quantitative evaluation of disentangled representations",
    )
)
class DciEstimator(AttributeEstimator):
    """Score how models use the units of a layer to predict attributes, see `dci`.

    Args:
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)``, m of 2 or more; or a list of keys.
        out_key: Key to write, ``(*lead, 1)`` float32, or ``(*lead, m)`` for the measures that are about attributes.
        measure: ``"disentanglement"`` (one score), ``"completeness"`` or ``"informativeness"`` (by attribute).
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        model: ``"lasso"``, ``"forest"`` or ``"boosting"``.
        alpha: Strength of the penalty of ``"lasso"``.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Example:
        >>> import torch
        >>> z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> td = DciEstimator()(TensorDict({"latents": z, "attributes": z[:, :2]}))
        >>> bool(td["dci"] > 0.95)
        True

    References:
        Eastwood, Williams 2018, A framework for the quantitative evaluation of disentangled representations.
    """

    least_attributes, least_units = 2, 2

    def __init__(
        self,
        in_key: Any = "latents",
        attributes: Any = "attributes",
        out_key: Any = "dci",
        measure: str = "disentanglement",
        *,
        discrete: Any = False,
        model: str = "lasso",
        alpha: float = 0.01,
        bank_size: int = 4096,
    ) -> None:
        super().__init__(in_key, attributes, out_key, discrete, bank_size)
        for name, got, known in (("measure", measure, MEASURES), ("model", model, MODELS)):
            if got not in known:
                raise ConfigError(unknown(name, str(got), known))
        if not alpha > 0:
            raise ConfigError(f"got alpha={alpha!r}; allowed are numbers above 0")
        self.measure, self.model, self.alpha = measure, model, alpha

    def target_names(self, count: int) -> tuple[str, ...]:
        """Name the attributes, or the one column after all of them."""
        if self.measure == "disentanglement":
            return (", ".join(map(str, self.target_keys)),)
        return super().target_names(count)

    def score(self, state: Any) -> TensorDict:
        """Score each layer of a `ReservoirState` of 8 rows or more.

        Returns:
            ``"score"``, ``(*lead, l, 1)`` or ``(*lead, l, m)`` float64, and ``"finite"``.
        """
        if int(state.n) < 8:
            raise ConfigError(f"got {int(state.n)} rows; dci fits models on three quarters of them and needs 8 or more")
        name = {"completeness": "by_attribute"}.get(self.measure, self.measure)

        def work(z: Tensor, known: tuple[Tensor, tuple[bool, ...]]) -> Tensor:
            self._check(z.shape[1], known[0].shape[1])
            return dci_of(*importances(Inputs(z, *known, None, False), self.model, self.alpha, 0))[name].reshape(-1)

        found = by_layer(state, len(self.target_keys), self._discrete, lambda *known: known, work)
        return self._table(found, layer_list(state.rows)[0].shape[:-2])
