"""Models whose every value and gradient is known, for tests of caching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdprobe.latent import ActivationCaching


class Two(nn.Module):
    """y = linear2(linear1(x)) with hand-made weights, so that every value and gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(2, 3, bias=False)
        self.linear2 = nn.Linear(3, 1, bias=False)
        self.linear1.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        self.linear2.weight.data = torch.tensor([[1.0, -1.0, 3.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x))


X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
HIDDEN = torch.tensor([[1.0, 4.0, 3.0], [3.0, -2.0, 2.0]])
OUT = torch.tensor([[6.0], [11.0]])


def run(factory: ActivationCaching, model: nn.Module, x: Tensor = X) -> Any:
    with factory.prepare(model) as hooked:
        hooked(x)
    return hooked.hooking_context.cache


def linear() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.zeros(2)
    return layer


class Net(nn.Module):
    """``first`` is applied to 2 x, then ``after`` does whatever a model may do to tensors it holds."""

    def __init__(self, first: nn.Module, after: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = first
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return self.after(self.first(x), x)
