"""Eigenvalues of every layer, found once for all estimators that read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from tensordict import TensorClass
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.stats.kernel_rows import KernelRows, check_kernel
from tdprobe.stats.moments import MomentsState
from tdprobe.stats.reservoir import ReservoirState
from tdprobe.stats.state import Derivation, all_finite, layer_list

# Variance relative to the mean square that still counts as none.
CONSTANT = 1e-12


class SpectrumTable(TensorClass):
    """Hold what `Spectrum` found in l layers; NaN for layers that are not finite or do not vary.

    Attributes:
        n: Rows behind it, int64.
        shares: Eigenvalues divided by their sum, in descending order, ``(*lead, l, k)`` float64, with zeros behind
            the last; k is 0 where they were not asked for.
        purity: Sum of the squared shares, ``(*lead, l)`` float64.
        finite: Whether a layer holds finite numbers only, ``(*lead, l)`` bool.
    """

    n: Tensor
    shares: Tensor
    purity: Tensor
    finite: Tensor


@dataclass(frozen=True)
class Spectrum(Derivation):
    """Say which spectrum to find.

    The eigenvalues of ``X'X`` and those of the Gram matrix ``XX'`` are the same but for zeros, so moments give those
    of the linear kernel whatever the number of rows. From a bank of n rows the matrix is that of the kernel: n x n,
    one layer at a time, and never whole where only the purity is wanted.

    Args:
        center: Subtract the mean, in the space of the kernel.
        normalize_rows: Divide rows by their length first; moments have it done already.
        kernel: ``"linear"`` or ``"rbf"``; moments know the linear one only.
        bandwidth: Of ``"rbf"``, in units of the median distance.
        values: Find the eigenvalues; otherwise the sum of their squares only, which needs none.

    Example:
        >>> from tdprobe.stats import Moments
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> state = Moments().update(Moments().init([x], torch.arange(4)), [x], torch.arange(4))
        >>> Spectrum(center=True)(state).shares
        tensor([[0.8000, 0.2000]], dtype=torch.float64)
    """

    center: bool = False
    normalize_rows: bool = False
    kernel: str = "linear"
    bandwidth: float = 1.0
    values: bool = True

    def __post_init__(self) -> None:
        """Check the kernel."""
        check_kernel(self.kernel, self.bandwidth)

    def joined(self, other: Any) -> Spectrum | None:
        """Return what serves both, or ``None`` where they look at different matrices."""
        if not isinstance(other, Spectrum) or replace(self, values=True) != replace(other, values=True):
            return None
        return replace(self, values=self.values or other.values)

    def __call__(self, state: MomentsState | ReservoirState) -> SpectrumTable:
        """Find the spectra of all layers of a state."""
        layers = layer_list(state.mu if isinstance(state, MomentsState) else state.rows)
        # The caller's autograd, autocast and inference mode are the model's.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(layers[0].device.type, enabled=False):
            if isinstance(state, MomentsState):
                parts = [self._of_moments(state, str(i)) for i in range(len(layers))]
            else:
                parts = [self._of_rows(x) for x in layers]
        shares, purity, finite = zip(*parts, strict=True)
        # A layer without columns has no eigenvalue, but needs a place for its NaN.
        width = max(int(self.values), *(x.shape[-1] for x in shares))
        padded = torch.stack([torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in shares], -2)
        purity = torch.stack(purity, -1)
        return SpectrumTable(
            n=state.n,
            shares=padded.masked_fill(purity.isnan().unsqueeze(-1), torch.nan),
            purity=purity,
            finite=torch.stack(finite, -1),
        )

    def _of_moments(self, state: MomentsState, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        mu, matrix = state.mu[layer], state.scatters[layer]
        spread = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        power = spread + state.n * mu.square().sum(-1)
        if not self.center:
            matrix = torch.addcmul(matrix, (state.n * mu).unsqueeze(-1), mu.unsqueeze(-2))
        finite = power.isfinite()
        trace = _usable(spread if self.center else power, power)
        matrix = matrix / trace[..., None, None]
        shares = spectral_shares(matrix) if self.values else power.unsqueeze(-1)[..., :0]
        purity = matrix.square().sum((-2, -1))
        return shares, purity.masked_fill(trace.isnan(), torch.nan), finite

    def _of_rows(self, x: Float[Tensor, "*lead n d"]) -> tuple[Tensor, Tensor, Tensor]:
        lead, n = x.shape[:-2], x.shape[-2]
        finite = all_finite(x)
        purity = torch.full(lead, torch.nan, dtype=torch.float64, device=x.device)
        shares = torch.full((*lead, n * self.values), torch.nan, dtype=torch.float64, device=x.device)
        options = {"center": self.center, "normalize_rows": self.normalize_rows}
        for index in product(*map(range, lead)):
            if not bool(finite[index]):
                continue
            kernel = KernelRows(x[index], self.kernel, self.bandwidth, **options)
            trace = _usable(kernel.diagonal.sum(), kernel.power)
            if self.values:
                matrix = torch.cat([kernel.block(part) for part in kernel.parts()]) / trace
                shares[index] = spectral_shares(matrix)
                purity[index] = matrix.square().sum()
            else:
                squares = [(kernel.block(part) / trace).square().sum() for part in kernel.parts()]
                purity[index] = torch.stack(squares).sum()
        return shares, purity, finite


def _usable(trace: Tensor, power: Tensor) -> Tensor:
    # Written so that NaN is constant too.
    return torch.where((trace > CONSTANT * power) & trace.isfinite(), trace, torch.nan)


def spectral_shares(matrix: Float[Tensor, "*lead k k"]) -> Float[Tensor, "*lead k"]:
    """Return the eigenvalues of symmetric matrices of trace 1 in descending order, NaN where one holds NaN.

    Those below ``k`` roundings of the largest are what rounding makes of zeros, and are set to it.

    Example:
        >>> spectral_shares(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
        tensor([1., 0.])
    """
    bad = matrix.isnan().flatten(-2).any(-1, keepdim=True)
    # The solver refuses NaN, in one data set for all.
    values = torch.linalg.eigvalsh(matrix.masked_fill(bad.unsqueeze(-1), 0.0)).flip(-1)
    zero = values <= matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values[..., :1]
    return values.masked_fill(zero, 0.0).masked_fill(bad, torch.nan)


def as_spectrum(state: Any, wanted: Spectrum) -> SpectrumTable:
    """Return a table as it is, and work it out from moments or a bank."""
    return state if isinstance(state, SpectrumTable) else wanted(state)


def check_order(alpha: float) -> None:
    """Refuse orders for which there is no entropy, or none that rounding leaves alone.

    Raises:
        ConfigError: 0 or less, or NaN.
    """
    if not alpha > 0:
        raise ConfigError(
            f"got alpha={alpha!r}; allowed are orders above 0, float('inf') included (order 0 counts the eigenvalues "
            "that are not zero, and rounding decides which those are)"
        )


def renyi_entropy(shares: Float[Tensor, "*lead k"], alpha: float = 1.0) -> Float[Tensor, "*lead"]:
    """Compute the Renyi entropy of shares that sum to 1, in nats.

    ``log(sum p^alpha) / (1 - alpha)``; ``-sum p log p`` for alpha = 1, ``-log max p`` for infinity. Continuous in
    alpha to rounding, also next to 1.

    Args:
        shares: Not negative, summing to 1 along the last dimension.
        alpha: Order, above 0.

    Example:
        >>> [round(float(renyi_entropy(torch.tensor([0.5, 0.25, 0.25]), alpha).exp()), 3) for alpha in (1, 2, math.inf)]
        [2.828, 2.667, 2.0]

    References:
        Renyi 1961, On measures of entropy and information.
    """
    check_order(alpha)
    shares = shares.double()
    if alpha == 1:
        return torch.special.entr(shares).sum(-1)
    if math.isinf(alpha):
        return -shares.amax(-1).log()
    logs = shares.log()
    if abs(alpha - 1) < 0.5:
        # sum p^alpha = 1 + sum p (p^(alpha-1) - 1), without the cancellation that the left side has near 1.
        terms = torch.where(shares == 0, 0.0, shares * torch.expm1((alpha - 1) * logs))
        return torch.log1p(terms.sum(-1)) / (1 - alpha)
    return torch.logsumexp(alpha * logs, -1) / (1 - alpha)
