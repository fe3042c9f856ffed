"""Centred kernel alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import PairEstimator
from tdprobe.registry import Mode, Spec, check_mode, register
from tdprobe.stats.cross import Cross
from tdprobe.stats.cross_state import CrossState
from tdprobe.stats.gram import Gram, GramState
from tdprobe.stats.kernels import Kernel, Kernels, KernelTable, as_kernels
from tdprobe.stats.reservoir import Reservoir, ReservoirState
from tdprobe.stats.routes import cheapest
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

KERNELS = ("linear", "rbf")
BANK = 4096
# Bytes that are never too many for a state.
SMALL = 2**28


@register(
    Spec(
        name="cka",
        kind="pair",
        symmetric=True,
        bounds=(0.0, 1.0),
        larger_means="more similar",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("gram", "cross", "reservoir"),
        cost="n^2 d per layer and n^2 per pair of each batch (or bank), or n d^2 per pair",
        reference="Kornblith et al. 2019, Similarity of neural network representations revisited",
        streaming={"minibatch": True},
    )
)
class CkaEstimator(PairEstimator):
    """Measure how alike the kernels of two representations are.

    ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))``; with the linear kernel that is
    ``|X'Y|_F^2 / (|X'X|_F |Y'Y|_F)`` with centred columns. Few samples of many columns look alike by themselves;
    ``unbiased`` removes that, and may be negative.

    The rbf kernel is ``exp(-|x - y|^2 / (2 b^2))`` with ``b^2 = threshold^2 m``, where m is the median squared
    distance of two rows that differ: of all pairs i < j up to 1,024 rows, else of 1,024 rows evenly spaced.

    A layer whose variance is at most ``eps`` of its mean square counts as constant and scores NaN, as does a
    layer with NaN. The threshold is relative: scaling a layer never changes its score.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        kernel: ``"linear"`` or ``"rbf"``.
        eps: Variance relative to the mean square that still counts as none.
        mode: ``"strict"``: the plain product, as published; ``"robust"``: the unbiased one.
        unbiased: Use HSIC_1 (n >= 4, value in [-1, 1]) instead of the plain product (in [0, 1]); by default as
            ``mode`` says.
        minibatch: Keep one number per pair of layers, by centring every batch by itself. It approaches the
            full value as batches grow. A one-shot call is one batch, hence exact. Linear kernel only.
        threshold: Bandwidth of the rbf kernel, in units of the median distance.
        bank_size: Keep that many rows of a stream and compare them all with one another, exactly; the score then
            has a standard error. By default 4,096 for the rbf kernel, while the linear one keeps cross-covariances
            of all rows. A one-shot call uses all rows.

    Raises:
        NotImplementedError: Any other kernel.
        ConfigError: A bad key, a negative ``eps``, a ``threshold`` that is not positive, an unknown mode, or
            ``minibatch`` with the rbf kernel or a bank.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> td = TensorDict({"data_a": x, "data_b": 3 * x + 1})
        >>> CkaEstimator()(td)["cka"], CkaEstimator(kernel="rbf")(td)["cka"]
        (tensor(1.), tensor(1.))

    References:
        Kornblith et al. 2019, Similarity of neural network representations revisited.
        Song et al. 2012, Feature selection via dependence maximization (unbiased).
        Nguyen, Raghu, Kornblith 2021, Do wide and deep networks learn the same things? (minibatch).
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "cka",
        kernel: str = "linear",
        eps: float = 1e-12,
        *,
        mode: Mode = "strict",
        unbiased: bool | None = None,
        minibatch: bool = False,
        threshold: float = 1.0,
        bank_size: int | None = None,
    ) -> None:
        super().__init__([in_key_a, in_key_b], [out_key])
        if kernel not in KERNELS:
            raise NotImplementedError(f"got kernel={kernel!r}; implemented are {' and '.join(map(repr, KERNELS))}")
        if not eps >= 0:
            raise ConfigError(f"got eps={eps!r}; allowed are numbers from 0 on, relative to the mean square")
        if not threshold > 0:
            raise ConfigError(f"got threshold={threshold!r}; allowed are positive numbers, such as 0.5")
        if minibatch and (kernel == "rbf" or bank_size is not None):
            given = "kernel='rbf'" if kernel == "rbf" else f"bank_size={bank_size}"
            raise ConfigError(f"got minibatch=True and {given}, which compares all rows of a bank; leave one out")
        self.in_key_a, self.in_key_b, self.out_key = in_key_a, in_key_b, out_key
        self.kernel, self.eps, self.unbiased, self.minibatch = kernel, eps, unbiased, minibatch
        self.mode, self.threshold, self.bank_size = check_mode(mode), threshold, bank_size

    @property
    def _unbiased(self) -> bool:
        return self.mode == "robust" if self.unbiased is None else self.unbiased

    def statistic(self) -> Statistic:
        """Return `Gram` for minibatches, `Reservoir` for a bank or the rbf kernel, else `Cross`."""
        if self.kernel == "rbf" or self.bank_size is not None:
            return Reservoir(BANK if self.bank_size is None else self.bank_size)
        return Gram(self._unbiased) if self.minibatch else Cross(self._unbiased)

    def at_hand(self) -> tuple[Statistic, ...]:
        """Return `Gram` too in place of `Cross`: of rows that all meet in one update it is the exact value."""
        own = self.statistic()
        return (Gram(self._unbiased, whole=True), own) if isinstance(own, Cross) else (own,)

    def _one_shot(self, batch: Batch) -> Statistic:
        if isinstance(self.statistic(), Reservoir):
            return Reservoir(max(1, batch.n))
        rows = batch.rows.values()
        # Products that take more memory than the rows do are not worth their speed.
        budget = max(SMALL, sum(x.numel() * x.element_size() for x in rows))
        return cheapest(self.at_hand(), [x.shape[-1] for x in rows], batch.n, budget)

    def derivation(self, state: Any) -> Kernels | None:
        """Ask for sums of the kernel over the pairs of rows of a bank."""
        return Kernels((self._kernel,)) if isinstance(state, ReservoirState) else None

    @property
    def _kernel(self) -> Kernel:
        return Kernel("rbf", threshold=float(self.threshold)) if self.kernel == "rbf" else Kernel("gram")

    def score(self, state: Any) -> TensorDict:
        """Compute CKA of all layer pairs.

        Args:
            state: `GramState`, `CrossState`, `ReservoirState` or `KernelTable`.

        Returns:
            ``"score"``, ``(*lead, l, l)`` float64; ``"finite"``; of a bank also its standard error ``"se"``.

        Raises:
            ConfigError: Fewer than 4 rows with ``unbiased=True``.
        """
        if self._unbiased and int(state.n) < 4:
            raise ConfigError(f"got {int(state.n)} rows; cka with unbiased=True needs at least 4")
        if isinstance(state, CrossState) and not self._unbiased:
            # Another estimator of the stream may need the unbiased product.
            state = state.plain
        if not isinstance(state, (ReservoirState, KernelTable)):
            # What is not finite in a layer is not finite in its sums.
            return TensorDict({"score": _ratio(state, self.eps), "finite": state.power.isfinite()})
        table = as_kernels(state, Kernels((self._kernel,)))
        return table.scored(self._kernel, lambda sums: sums.alignment(self._unbiased), self.eps)


def cka_matrix(rows: Sequence[Tensor], *, unbiased: bool = False) -> Float[Tensor, "l l"]:
    """Compute the exact linear CKA of every pair of layers from rows in memory.

    One Gram per layer in tiles and all pairs by one batched product, or, of many more rows than columns, their
    cross-covariances, whichever takes less work (`tdprobe.stats.routes.cheapest`). No N x N matrix is ever held.

    Args:
        rows: One tensor per layer, ``(n, d_layer)``; widths may differ, views are fine.
        unbiased: Use HSIC_1 (n >= 4) instead of the plain product.

    Returns:
        CKA, symmetric, ``(l, l)`` float64; NaN for layers without variance.

    Raises:
        ConfigError: Layers with different numbers of rows, or fewer than 4 with ``unbiased=True``.

    Example:
        >>> x = torch.randn(100, 8)
        >>> cka_matrix([x, 2 * x]).allclose(torch.ones(2, 2, dtype=torch.float64))
        True
    """
    ids = torch.arange(rows[0].shape[0] if rows else 0, device="cpu")
    batch = Batch({f"layer {index}": x for index, x in enumerate(rows)}, ids)
    estimator = CkaEstimator(unbiased=unbiased)
    statistic = estimator._one_shot(batch)
    return estimator.score(statistic.update(statistic.init(rows, ids), rows, ids))["score"]


def _ratio(state: GramState | CrossState, eps: float) -> Float[Tensor, "*lead l l"]:
    hsic, spread = state.hsic, state.spread
    own = hsic.diagonal(dim1=-2, dim2=-1)
    # Written so that NaN is degenerate too.
    own = torch.where((spread > eps * state.power) & (own > 0), own, torch.nan).sqrt()
    return hsic / (own.unsqueeze(-1) * own.unsqueeze(-2))
