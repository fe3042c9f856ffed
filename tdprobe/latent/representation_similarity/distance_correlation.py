"""Distance correlation."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict

from tdprobe.errors import ConfigError
from tdprobe.estimator import PairEstimator
from tdprobe.registry import Mode, Spec, check_mode, register
from tdprobe.stats.kernels import Kernel, Kernels, as_kernels
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

KERNEL = Kernel("distance")


@register(
    Spec(
        name="distance_correlation",
        kind="pair",
        symmetric=True,
        bounds=(0.0, 1.0),
        larger_means="more dependent",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n^2 per pair, for a bank of n rows",
        reference="Szekely, Rizzo 2014, Partial distance correlation with methods for dissimilarities",
    )
)
class DistanceCorrelationEstimator(PairEstimator):
    """Measure any dependence between two representations by the distances within each.

    ``R = (A . B) / sqrt((A . A) (B . B))`` with the U-centred distances
    ``A_ij = a_ij - a_i. / (n-2) - a_.j / (n-2) + a_.. / ((n-1) (n-2))`` for i != j and 0 for i = j, and
    ``A . B = sum_ij A_ij B_ij / (n (n-3))``. It estimates the squared distance correlation, which is 0 only for
    independent representations, without the bias of few samples, and may be negative. ``unbiased=False`` centres
    doubly instead, with the diagonal: the square of the 2007 statistic, between 0 and 1.

    A layer without variance scores NaN, as does one with NaN. The standard error leaves out one eighth of the rows
    at a time; for independent layers it is too large by up to a half.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        unbiased: U-centre (n >= 4) instead of centring doubly.
        mode: Changes nothing here: ``"strict"`` and ``"robust"`` agree.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, or an unknown mode.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 100).unsqueeze(1)
        >>> td = TensorDict({"data_a": x, "data_b": x.square()})  # uncorrelated, and dependent
        >>> bool(DistanceCorrelationEstimator()(td)["distance_correlation"] > 0.2)
        True

    References:
        Szekely, Rizzo 2014, Partial distance correlation with methods for dissimilarities.
        Szekely, Rizzo, Bakirov 2007, Measuring and testing dependence by correlation of distances (biased).
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "distance_correlation",
        unbiased: bool = True,
        *,
        mode: Mode = "strict",
        bank_size: int = 4096,
    ) -> None:
        super().__init__([in_key_a, in_key_b], [out_key])
        self.in_key_a, self.in_key_b, self.out_key = in_key_a, in_key_b, out_key
        self.unbiased, self.mode, self.bank_size = unbiased, check_mode(mode), bank_size

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def derivation(self, state: Any) -> Kernels:
        """Ask for sums of the distances over the pairs of rows of a bank."""
        return Kernels((KERNEL,))

    def score(self, state: Any) -> TensorDict:
        """Compute the squared distance correlation of all layer pairs.

        Args:
            state: `ReservoirState` or `KernelTable`.

        Returns:
            ``"score"`` and its standard error ``"se"``, ``(*lead, l, l)`` float64; ``"finite"``.

        Raises:
            ConfigError: Fewer than 4 rows; fewer than 2 with ``unbiased=False``.
        """
        least = 4 if self.unbiased else 2
        if int(state.n) < least:
            raise ConfigError(
                f"got {int(state.n)} rows; distance_correlation with unbiased={self.unbiased} needs at least {least}"
            )
        table = as_kernels(state, self.derivation(state))
        return table.scored(KERNEL, lambda sums: sums.alignment(self.unbiased))
