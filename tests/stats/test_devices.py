"""What states owe to the devices of their tensors, as far as a machine without a GPU can tell; see test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdprobe.latent.information import gaussian_mixture_entropy
from tdprobe.latent.information import pair_distances as pairs_module
from tdprobe.modules import input_device
from tdprobe.stats import Cross, Gram, Reservoir, Statistic
from tdprobe.stats import cross as cross_module
from tdprobe.stats import gram as gram_module
from tdprobe.stats.sync import placed_like

META = torch.device("meta")


def rows(kind: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, d, generator=generator, dtype=torch.float64).float().to(kind) for d in (3, 5)]


def fed(statistic: Statistic, layers: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.arange(len(layers[0]))
    return statistic.update(statistic.init(layers, ids), layers, ids).hsic


@pytest.mark.parametrize("statistic", [Gram(), Gram(unbiased=False), Cross(), Cross(unbiased=True), Cross(sketch=2)])
def test_sums_are_in_float64_where_float32_would_be_tf32(monkeypatch: pytest.MonkeyPatch, statistic: Statistic) -> None:
    exact = fed(statistic, rows(torch.float64))
    assert not torch.allclose(fed(statistic, rows()), exact, rtol=1e-12, atol=0)
    for module in (cross_module, gram_module):
        monkeypatch.setattr(module, "summed_dtype", lambda layers: torch.float64)
    torch.testing.assert_close(fed(statistic, rows()), exact, rtol=1e-12, atol=0)


def test_expanded_distances_are_in_float64_where_float32_would_be_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, y, means = torch.randn(3, 4, 5, 6, generator=generator)
    inputs = (clean, y, means, torch.ones_like(clean), torch.ones(4, 5))
    exact = gaussian_mixture_entropy(*(x.double() for x in inputs), method="matmul").float()
    monkeypatch.setattr(pairs_module, "float32_is_exact", lambda device: False)
    asked = []
    monkeypatch.setattr(pairs_module, "_products", lambda a, b, of=pairs_module._products: asked.append(a) or of(a, b))
    torch.testing.assert_close(gaussian_mixture_entropy(*inputs, method="matmul"), exact, rtol=1e-6, atol=0)
    assert {x.dtype for x in asked} == {torch.float64}


def test_a_state_goes_where_the_parts_of_another_one_are() -> None:
    layers, ids = rows(), torch.arange(40)
    state = Reservoir(8).update(Reservoir(8).init(layers, ids), layers, ids)
    other = state.clone()
    other.rows = other.rows.to(META)
    moved = placed_like(state, other)
    assert type(moved) is type(state) and moved.batch_size == state.batch_size
    assert {x.device for x in moved.rows.values()} == {META} and moved.n_seen.device == state.n_seen.device
    assert torch.equal(moved.ids, state.ids)


def test_inputs_go_to_weights_that_are_there() -> None:
    offloaded = nn.Linear(2, 2, device=META)
    assert input_device(nn.Sequential(offloaded, nn.Linear(2, 2))) == torch.device("cpu")
    assert input_device(nn.Sequential(offloaded)) is None and input_device(nn.ReLU()) is None
