"""Representational similarity analysis."""

from __future__ import annotations

from typing import Any, Literal, get_args

from tensordict import TensorDict

from tdprobe.errors import ConfigError, unknown
from tdprobe.estimator import PairEstimator
from tdprobe.registry import Mode, Spec, check_mode, register
from tdprobe.stats.kernels import Kernel, Kernels, as_kernels
from tdprobe.stats.pair_sums import PairSums
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

Rdm = Literal["correlation", "cosine", "euclidean"]
Comparison = Literal["spearman", "pearson"]
# The squared length of a difference is twice one minus the cosine, where rows have length one.
KERNELS = {
    "correlation": Kernel("square", "standard"),
    "cosine": Kernel("square", "unit"),
    "euclidean": Kernel("distance"),
}
LEAST = 3


@register(
    Spec(
        name="rsa",
        kind="pair",
        symmetric=True,
        bounds=(-1.0, 1.0),
        larger_means="more similar",
        invariant_to=frozenset({"permutation", "isotropic scaling"}),
        needs=("reservoir",),
        cost="n^2 d per layer (twice for ranks) and n^2 per pair, for a bank of n rows",
        reference="Kriegeskorte, Mur, Bandettini 2008, Representational similarity analysis",
    )
)
class RsaEstimator(PairEstimator):
    """Correlate the dissimilarities of all pairs of samples in one representation with those in another.

    The representational dissimilarity matrix (RDM) of a layer holds, for samples i < j, one minus the correlation
    of their rows (over columns), one minus their cosine, or their Euclidean distance. The score is the rank
    correlation, or the correlation, of the entries of two RDMs. Neither matrix is ever held.

    With the correlation RDM the score changes with rotations and translations of a layer; with cosines it is
    invariant to rotations, with Euclidean distances to both. A row of zeros (of equal numbers, for correlations) is
    at dissimilarity 1 from all others. A layer whose dissimilarities are all equal scores NaN, as does one with NaN.

    Ranks are exact up to 1,024 rows; beyond, distances count as tied that fall into one of 65,536 bins, which
    moves the score by less than 1e-4 (see `RankTable`). The standard error leaves out one eighth of the rows at
    a time, and keeps ranks as they are.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        rdm: ``"correlation"``, ``"cosine"`` or ``"euclidean"``.
        comparison: ``"spearman"`` (tied entries get the mean of their ranks) or ``"pearson"``.
        mode: Changes nothing here: ``"strict"`` and ``"robust"`` agree.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, or an unknown ``rdm``, ``comparison`` or mode.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
        >>> td = RsaEstimator(rdm="euclidean")(TensorDict({"data_a": x, "data_b": x.square()}))
        >>> td["rsa"]
        tensor(1.)

    References:
        Kriegeskorte, Mur, Bandettini 2008, Representational similarity analysis: connecting the branches of
        systems neuroscience.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "rsa",
        rdm: Rdm = "correlation",
        comparison: Comparison = "spearman",
        *,
        mode: Mode = "strict",
        bank_size: int = 4096,
    ) -> None:
        super().__init__([in_key_a, in_key_b], [out_key])
        if rdm not in KERNELS:
            raise ConfigError(unknown("rdm", rdm, get_args(Rdm)))
        if comparison not in get_args(Comparison):
            raise ConfigError(unknown("comparison", comparison, get_args(Comparison)))
        self.in_key_a, self.in_key_b, self.out_key = in_key_a, in_key_b, out_key
        self.rdm, self.comparison, self.mode, self.bank_size = rdm, comparison, check_mode(mode), bank_size

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    @property
    def _kernel(self) -> Kernel:
        kernel = KERNELS[self.rdm]
        # Distances rank like their squares.
        return kernel if self.comparison == "pearson" else Kernel("square", kernel.view, ranks=True)

    def derivation(self, state: Any) -> Kernels:
        """Ask for sums of the dissimilarities, or of their ranks, over the pairs of rows of a bank."""
        return Kernels((self._kernel,))

    def score(self, state: Any) -> TensorDict:
        """Correlate the RDMs of all layer pairs.

        Args:
            state: `ReservoirState` or `KernelTable`.

        Returns:
            ``"score"`` and its standard error ``"se"``, ``(*lead, l, l)`` float64; ``"finite"``.

        Raises:
            ConfigError: Fewer than 3 rows.
        """
        if int(state.n) < LEAST:
            raise ConfigError(f"got {int(state.n)} rows; rsa needs at least {LEAST} samples")
        return as_kernels(state, self.derivation(state)).scored(self._kernel, PairSums.correlation)
