"""Entropy of a layer from the eigenvalues of its kernel matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.spectrum_estimator import SpectrumEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats.kernel_rows import check_kernel
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.spectrum import Spectrum, SpectrumTable, check_order, renyi_entropy
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch


@register(
    Spec(
        name="matrix_entropy",
        kind="layer",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="more ways in which samples differ",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling"}),
        needs=("moments", "reservoir"),
        cost="n d^2 + d^3 per layer; with an rbf kernel n^2 d + n^3 for a bank of n rows",
        reference="Sanchez Giraldo et al. 2015, Measures of entropy from data using infinitely divisible kernels",
    )
)
class MatrixEntropyEstimator(SpectrumEstimator):
    """Measure the matrix-based Renyi entropy of a layer, in nats.

    ``S_alpha = log(tr A^alpha) / (1 - alpha)`` with the kernel matrix ``A = K / tr K`` of the rows, that is the Renyi
    entropy of its eigenvalues; alpha = 1 is the von Neumann entropy, infinity ``-log`` of the largest eigenvalue.
    0 where all rows are alike, ``log k`` for k equal groups of rows that have nothing in common, at most ``log n``.

    The linear kernel streams exactly, for rows of any number, since ``X'X`` has the eigenvalues of ``XX'``. With unit
    rows, the default, it is the kernel of the definition, whose diagonal is constant. The rbf kernel holds the n x n
    matrix of one layer at a time, of a bank of rows. Order 2 needs no eigenvalues: ``-log |A|_F^2``.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        alpha: Order, above 0; ``float("inf")`` is one.
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: Of ``"rbf"``: standard deviation in units of the median distance between rows that differ.
        center: Subtract the mean, in the space of the kernel.
        normalize_rows: Divide each row by its length, before anything else.
        bank_size: Rows to keep of a stream for ``"rbf"``; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, order, kernel, bandwidth or flag.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.eye(3).repeat(4, 1)
        >>> round(float(MatrixEntropyEstimator()(TensorDict({"data": x}))["matrix_entropy"].exp()), 4)
        3.0

    References:
        Sanchez Giraldo, Rao, Principe 2015, Measures of entropy from data using infinitely divisible kernels.
        Skean et al. 2025, Layer by layer: uncovering hidden representations in language models.
    """

    def __init__(
        self,
        in_key: Any = "data",
        out_key: Any = "matrix_entropy",
        alpha: float = 1.0,
        kernel: str = "linear",
        *,
        bandwidth: float = 1.0,
        center: bool = False,
        normalize_rows: bool = True,
        bank_size: int = 1024,
    ) -> None:
        super().__init__(in_key, out_key, center, normalize_rows)
        check_order(alpha)
        check_kernel(kernel, bandwidth)
        self.alpha, self.kernel, self.bandwidth, self.bank_size = alpha, kernel, bandwidth, bank_size

    def statistic(self) -> Statistic:
        """Return `Moments` for the linear kernel, else a `Reservoir` of ``bank_size`` rows."""
        return super().statistic() if self.kernel == "linear" else Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return super()._one_shot(batch) if self.kernel == "linear" else Reservoir(max(1, batch.n))

    def derivation(self, state: Any) -> Spectrum:
        """Ask for the eigenvalues, or the sum of their squares."""
        bandwidth = 1.0 if self.kernel == "linear" else float(self.bandwidth)
        return Spectrum(self.center, self.normalize_rows, self.kernel, bandwidth, values=self.alpha != 2)

    def _value(self, table: SpectrumTable) -> Float[Tensor, "*lead l"]:
        return -table.purity.log() if self.alpha == 2 else renyi_entropy(table.shares, self.alpha)
