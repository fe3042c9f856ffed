"""Which neighbours `CknnaEstimator` counts: float32 and bfloat16 rows have those of the same numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernel_tools as plain
from tdprobe.latent import CknnaEstimator
from tdprobe.stats import Reservoir
from tdprobe.stats.state import layer_list

N, K = 240, 5


def like_activations(dtype: torch.dtype) -> Tensor:
    """Give some rows a huge mean, as first tokens have: products in float32 do not resolve what tells them apart."""
    rows = torch.randn(N, 24).cumsum(1)
    rows[:60] = rows[:60] / 100 + 300 * torch.randn(24)
    return rows.to(dtype)


LAYERS = {
    "huge norms": like_activations,
    "copies": lambda dtype: torch.randn(N, 24)[torch.arange(N) % 17].to(dtype),
    "copies of huge norms": lambda dtype: like_activations(dtype)[torch.arange(N) % 90],
    "few values": lambda dtype: torch.randint(0, 3, (N, 6)).to(dtype) + 100,
    "coordinates": lambda dtype: torch.eye(N).to(dtype),
    "large and small rows": lambda dtype: (torch.randn(N, 24) * torch.logspace(-4, 4, N).unsqueeze(1)).to(dtype),
}


def scored(*rows: Tensor) -> Tensor:
    bank, ids = Reservoir(N), torch.arange(N)
    state = bank.update(bank.init(rows, ids), rows, ids)
    assert [x.dtype for x in layer_list(state.rows)] == [x.dtype for x in rows]
    return CknnaEstimator(k=K).score(state)["score"]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_neighbours_are_those_of_the_given_numbers(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = LAYERS[kind](dtype), torch.randn(N, 12).to(dtype)
    expected = plain.cknna(x.double(), y.double(), K)
    assert float(scored(x, y)[0, 1]) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
