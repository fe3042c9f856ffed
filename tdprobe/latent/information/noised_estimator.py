"""What a layer would still tell about its rows if noise were added to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.estimator import LayerEstimator
from tdprobe.latent.information.bounds import kolchinsky_tracey_bounds
from tdprobe.latent.information.inputs import check_choice
from tdprobe.registry import Spec, register
from tdprobe.stats.reservoir import Reservoir, ReservoirState
from tdprobe.stats.state import Derivation, Statistic, layer_list
from tdprobe.stream.batch import Batch

BOUNDS = ("lower", "upper")
# Features that vary less than this share of the layer's typical standard deviation get noise of that size: units that
# never fire would otherwise have none, and anything at all could be read off them.
LEAST_STD = 1e-6


def floored(stds: Tensor) -> Tensor:
    """Return standard deviations (..., features) raised to a millionth of their quadratic mean."""
    return stds.maximum(LEAST_STD * stds.square().mean(-1, keepdim=True).sqrt())


def check_noise(noise: Any, least: float = 0.0) -> None:
    """Refuse what is no relative standard deviation.

    Raises:
        ConfigError: It is negative, infinite or no number.
    """
    known = isinstance(noise, (int, float)) and not isinstance(noise, bool)
    if not known or not least <= noise < math.inf or (noise == 0 and least > 0):
        raise ConfigError(
            f"noise is a number of standard deviations of each feature, {'above' if least else 'from'} 0"
            f"{'' if least else ' on'}, such as 0.5; got {noise!r}"
        )


@dataclass(frozen=True)
class Sandwich(Derivation):
    """Both bounds of every layer of a reservoir.

    Args:
        noise: Standard deviation of the noise, in units of each feature's own, or absolute.
        relative: Whether it is in those units.
    """

    noise: float
    relative: bool = True

    def joined(self, other: Any) -> Sandwich | None:
        """Return itself for an equal one."""
        return self if other == self else None

    def __call__(self, state: ReservoirState) -> SandwichValue:
        """Work the bounds out, one layer after the other.

        Raises:
            ConfigError: The state has no rows.
        """
        if int(state.n) == 0:
            raise ConfigError("got 0 rows; noised_information needs at least 1")
        found = [self._bounds(rows) for rows in layer_list(state.rows)]
        lower, upper, finite = (torch.stack(parts, -1) for parts in zip(*found, strict=True))
        return SandwichValue(lower, upper, finite, state.n)

    def _bounds(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows.detach().double()
        finite = rows.isfinite().all(-1).all(-1)
        if not rows.shape[-1]:
            return (nothing := rows.new_zeros(rows.shape[:-2])), nothing, finite
        # Rows that are not finite make the bounds NaN by themselves; the noise must still be a number above 0.
        stds = floored(rows.std(-2, correction=0, keepdim=True)) if self.relative else rows.new_ones(1)
        stds = torch.where(stds > 0, self.noise * stds, 1)
        lower, upper = kolchinsky_tracey_bounds(rows, stds)
        return torch.where(finite, lower, torch.nan), torch.where(finite, upper, torch.nan), finite


@dataclass(frozen=True)
class SandwichValue:
    """Bounds of every layer, ``(*lead, l)`` float64, and the rows behind them."""

    lower: Tensor
    upper: Tensor
    finite: Tensor
    n: Tensor


@register(
    Spec(
        name="noised_information",
        kind="layer",
        symmetric=False,
        bounds=(0.0, math.inf),
        larger_means="more of the rows survives noise",
        invariant_to=frozenset({"permutation", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer, for a bank of n rows",
        reference="Kolchinsky, Tracey 2017, Estimating mixture entropy with pairwise distances",
    )
)
class NoisedInformationEstimator(LayerEstimator):
    r"""Bound how much a layer would tell about its rows if each feature got noise in proportion to its spread.

    Of n rows :math:`h_i`, one is drawn; :math:`Y = h_i + \text{noise} \cdot \sigma \cdot \epsilon`, with
    :math:`\sigma` the standard deviation of each feature over the rows. The score bounds I(i; Y) from one side, without
    drawing any noise; it is at most log n, and 0 for rows that are all the same. Nothing is changed in a model:
    `NoisedInformation` adds the noise as well.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32, nats per row.
        noise: Standard deviation of the noise in units of each feature's own, above 0.
        bound: ``"lower"`` (Bhattacharyya) or ``"upper"`` (Kullback-Leibler).
        relative: ``False`` takes ``noise`` as it is, the same for every feature.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, ``noise`` or ``bound``.

    Example:
        >>> td = TensorDict({"data": torch.randn(64, 100, generator=torch.Generator().manual_seed(0))})
        >>> NoisedInformationEstimator(noise=0.5)(td)["noised_information"]  # log 64: every row can be told
        tensor(4.1589)

    References:
        Kolchinsky, Tracey 2017, Estimating mixture entropy with pairwise distances.
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "noised_information",
        noise: float = 1.0,
        bound: Literal["lower", "upper"] = "upper",
        *,
        relative: bool = True,
        bank_size: int = 1024,
    ) -> None:
        super().__init__([in_key], [out_key])
        check_noise(noise, least=math.ulp(0.0))
        check_choice("bound", bound, BOUNDS)
        self.in_key, self.out_key, self.noise, self.bound = in_key, out_key, noise, bound
        self.relative, self.bank_size = relative, bank_size

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def derivation(self, state: Any) -> Sandwich:
        """Ask for both bounds, which several estimators share."""
        return Sandwich(self.noise, self.relative)

    def score(self, state: Any) -> TensorDict:
        """Bound the information of each layer.

        Args:
            state: `ReservoirState` or what `derivation` made of it.

        Returns:
            ``"score"``, ``"lower"`` and ``"upper"``, ``(*lead, l)`` float64 nats; ``"finite"``.

        Raises:
            ConfigError: No rows.
        """
        value = state if isinstance(state, SandwichValue) else self.derivation(state)(state)
        score = value.lower if self.bound == "lower" else value.upper
        return TensorDict({"score": score, "lower": value.lower, "upper": value.upper, "finite": value.finite})
