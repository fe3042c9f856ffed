"""Probes that are linear, or bilinear in two activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdprobe.errors import ConfigError
from tdprobe.latent.probing.mean_difference import MeanDifferenceClassifier
from tdprobe.latent.probing.torch_estimator import TorchEstimator


class LinearEstimator(TorchEstimator):
    """Read one activation linearly: W h + b.

    Args:
        d_latent: Width of h.
        bias: Whether there is a b.
        kwargs: Those of :class:`TorchEstimator`; the output has ``num_classes`` values, or one.

    Example:
        >>> x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
        >>> LinearEstimator(1, num_classes=2, lr=0.1).fit(x, y=torch.tensor([0, 0, 1, 1])).predict(x)
        tensor([0, 0, 1, 1])

    References:
        Alain, Bengio 2017, Understanding intermediate layers using linear classifier probes.
    """

    def __init__(self, d_latent: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.linear = nn.Linear(d_latent, self._num_classes or 1, bias=bias, device=self._device)

    def forward(self, *Xs: Tensor) -> Tensor:
        """Return (n, num_classes or 1).

        Raises:
            ConfigError: There is not exactly one input.
        """
        if len(Xs) != 1:
            raise ConfigError(f"a LinearEstimator reads one activation, got {len(Xs)}; a bilinear one reads two")
        return self.linear(Xs[0])


class BilinearEstimator(TorchEstimator):
    """Read two activations by a full bilinear form per output: h_1^T A h_2 + b.

    Args:
        d_latent1: Width of h_1.
        d_latent2: Width of h_2.
        bias: Whether there is a b.
        kwargs: Those of :class:`TorchEstimator`; the output has ``num_classes`` values, or one.
    """

    def __init__(self, d_latent1: int, d_latent2: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bilinear = nn.Bilinear(d_latent1, d_latent2, self._num_classes or 1, bias=bias, device=self._device)

    def forward(self, h1: Tensor, h2: Tensor) -> Tensor:
        """Return (n, num_classes or 1) of two inputs (n, width)."""
        return self.bilinear(h1, h2)


class LowRankBilinearEstimator(TorchEstimator):
    """Read two activations by a form of rank one per output: (U h_1 + u) * (V h_2 + v) + b.

    U and V have one row for each output, and offsets of their own; ``bias`` is about b only.

    Args:
        d_latent1: Width of h_1.
        d_latent2: Width of h_2.
        bias: Whether there is a b.
        kwargs: Those of :class:`TorchEstimator`; the output has ``num_classes`` values, or one.
    """

    def __init__(self, d_latent1: int, d_latent2: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        outputs = self._num_classes or 1
        self.linear1 = nn.Linear(d_latent1, outputs, device=self._device)
        self.linear2 = nn.Linear(d_latent2, outputs, device=self._device)
        self.bias = nn.Parameter(torch.zeros(outputs, device=self._device)) if bias else None

    def forward(self, h1: Tensor, h2: Tensor) -> Tensor:
        """Return (n, num_classes or 1) of two inputs (n, width)."""
        product = self.linear1(h1) * self.linear2(h2)
        return product if self.bias is None else product + self.bias


__all__ = [
    "BilinearEstimator",
    "LinearEstimator",
    "LowRankBilinearEstimator",
    "MeanDifferenceClassifier",
    "TorchEstimator",
]
