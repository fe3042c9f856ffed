"""A small model, and probes that write down what they get."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.latent import LinearEstimator, ProbeManager

X = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]])
Y = torch.tensor([1, 0])
KEYS = ["labels", "step_type"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.act = nn.ReLU()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, input: Tensor) -> Tensor:
        return self.blocks(self.act(self.first(input)))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


class Recorder:
    """A probe factory whose probes write down what they get."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        self.steps: list[tuple[str, str, Any, dict[str, Any]]] = []

    def __call__(self, name: str, direction: str) -> Any:
        self.made.append((name, direction))
        steps = self.steps

        class Writer:
            def step(self, data: Any, **items: Any) -> str:
                steps.append((name, direction, data, items))
                return "ignored"

        return Writer()

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.steps]


def batch(**extra: Any) -> TensorDict:
    return TensorDict({"input": X.clone(), "labels": Y, "step_type": "fit"} | extra, batch_size=[2])


def accuracy(predictions: Tensor, labels: Tensor) -> dict[str, Any]:
    return {"accuracy": (predictions == labels).float().mean().item()}


def linear_manager(**options: Any) -> ProbeManager:
    return ProbeManager(
        LinearEstimator, {"d_latent": 4, "num_classes": 2, "epochs": 50, "lr": 0.1}, accuracy, **options
    )
