"""Sketched cross products: what random maps do on average, and that sketched streams merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.stats import Cross
from tdprobe.stats.gram import gram_products
from tdprobe.stats.sketch import fourth_moments, sketch_map

WIDTHS = [12, 3, 9]


def feed(statistic: Cross, *batches: list[Tensor]):
    state = statistic.init(batches[0], torch.arange(0))
    for rows in batches:
        state = statistic.update(state, rows, torch.arange(len(rows[0])))
    return state


def layers(n: int = 40, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 4, generator=g, dtype=torch.float64)
    parts = [torch.randn(n, d, generator=g, dtype=torch.float64) for d in WIDTHS]
    return [x + common @ torch.randn(4, x.shape[1], generator=g, dtype=torch.float64) + 5 for x in parts]


def test_maps_are_scaled_frames_of_their_own_and_the_same_everywhere():
    w = sketch_map(50, 20, 0, 1)
    torch.testing.assert_close(w.mT @ w, 2.5 * torch.eye(20), rtol=1e-5, atol=1e-5)
    sketch_map.cache_clear()
    assert torch.equal(w, sketch_map(50, 20, 0, 1))
    others = [sketch_map(50, 20, 1, 0), sketch_map(50, 20, 0, 0), sketch_map(50, 20, 0, 2)]
    assert all((other - w).abs().max() > 0.5 for other in others)


@pytest.mark.parametrize(("d", "k"), [(2, 1), (3, 2), (7, 3), (5, 5)])
def test_fourth_moments_are_those_of_random_projections(d, k):
    w = torch.stack([sketch_map(d, k, seed, 0) for seed in range(4000)]).double()
    m = w @ w.mT
    expected = fourth_moments(d, k)
    # E M_01^2 = b and E M_00 M_11 = a; the tolerance is five standard errors of the mean over maps.
    for found, value in ((m[:, 0, 0] * m[:, 1, 1], expected[0]), (m[:, 0, 1].square(), expected[1])):
        assert float(found.mean()) == pytest.approx(value, abs=5 * float(found.std()) / 4000**0.5 + 1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
def test_products_are_right_on_average_over_maps(unbiased):
    rows = layers()
    found = torch.stack([feed(Cross(unbiased, sketch=5, seed=seed), rows).hsic for seed in range(600)])
    error = found.mean(0) - gram_products(rows, unbiased)
    assert (error.abs() < 4.5 * found.std(0) / 600**0.5 + 1e-6 * found.abs().max()).all()
    # Layers of 3 columns are kept as they are; all others differ from map to map.
    assert (found.std(0) > 1e-3 * found.mean(0).abs()).sum() == 8


@pytest.mark.parametrize("unbiased", [False, True])
def test_sketched_streams_merge_in_any_grouping(unbiased):
    rows, statistic = layers(60), Cross(unbiased, sketch=4, seed=3)
    a, b, c = ([x[start : start + 20] + start for x in rows] for start in (0, 20, 40))
    whole = [torch.cat(parts) for parts in zip(a, b, c, strict=True)]
    expected = feed(statistic, whole)
    for state in (feed(statistic, a, b, c), feed(statistic, c).merge(feed(statistic, a, b))):
        np.testing.assert_allclose(state.hsic, expected.hsic, rtol=1e-9)
        torch.testing.assert_close(state.block(2, 0), expected.block(2, 0), rtol=1e-9, atol=1e-9)


def test_a_sketched_state_holds_what_the_map_makes_of_the_rows():
    rows = layers()
    state = feed(Cross(sketch=4), rows)
    x, y = (rows[i] - rows[i].mean(0) for i in (0, 2))
    expected = (x @ sketch_map(12, 4, 0, 0).double()).mT @ (y @ sketch_map(9, 4, 0, 2).double())
    torch.testing.assert_close(state.block(0, 2), expected)
    assert state.columns == [4, 3, 4]
    held = sum(x.numel() * x.element_size() for x in state.values(include_nested=True, leaves_only=True))
    assert Cross(sketch=4).nbytes(WIDTHS) == held < Cross().nbytes(WIDTHS)


def test_states_of_different_sketches_do_not_merge():
    rows = layers()
    for other in (Cross(sketch=4, seed=1), Cross(sketch=9), Cross()):
        with pytest.raises(ConfigError, match=r"cannot merge|layer 0"):
            feed(Cross(sketch=4), rows).merge(feed(other, rows))
    with pytest.raises(ConfigError, match=r"layer widths \[12, 3, 9\]"):
        feed(Cross(sketch=2), rows).merge(feed(Cross(sketch=2), [rows[2], rows[1], rows[0]]))


def test_the_cheaper_way_is_a_sketch_and_says_so():
    cheaper = Cross(unbiased=True).cheaper()
    assert cheaper == Cross(unbiased=True, sketch=256)
    assert cheaper.cheaper() is None
    assert cheaper.route == "cross-covariances, sketched to 256 columns"
    assert Cross().route == "cross-covariances"
    with pytest.raises(ConfigError, match="sketch=0"):
        Cross(sketch=0)
