"""Jackknife errors against the formulas they reduce to."""

from __future__ import annotations

import pytest
import torch

from tdprobe.stats import jackknife_se, mean_se


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_single_rows_give_the_error_of_the_mean():
    x = normal(50, 3)
    assert torch.allclose(mean_se(x, torch.ones(50)), x.std(0) / 50**0.5, rtol=1e-12)


def test_equal_groups_give_the_error_of_the_mean_of_group_means():
    x = normal(40)
    sums = x.reshape(8, 5).sum(1)
    expected = (sums / 5).std() / 8**0.5
    assert float(mean_se(sums, torch.full((8,), 5.0))) == pytest.approx(float(expected), rel=1e-12)


def test_the_logarithm_of_a_mean_has_the_error_of_the_delta_method():
    x = normal(4000) * 0.1 + 2
    without = ((x.sum() - x) / 3999).log()
    se = jackknife_se(x.mean().log(), without, torch.ones(4000))
    assert float(se) == pytest.approx(float(x.std() / 4000**0.5 / x.mean()), rel=1e-3)


def test_unequal_groups_cover_the_spread_of_the_mean():
    sizes, found, means = torch.tensor([5.0, 20.0, 40.0, 60.0, 75.0, 100.0, 150.0, 250.0]), [], []
    for seed in range(400):
        sums = normal(8, seed=seed) * sizes.double().sqrt()
        found.append(float(mean_se(sums, sizes)))
        means.append(float(sums.sum() / sizes.sum()))
    spread = float(torch.tensor(means).std())
    assert float(torch.tensor(found).square().mean().sqrt()) == pytest.approx(spread, rel=0.15)


def test_empty_groups_do_not_count_and_one_group_says_nothing():
    sums, sizes = normal(5), torch.tensor([2.0, 3.0, 0.0, 4.0, 1.0])
    sums[2] = 0
    kept = torch.tensor([0, 1, 3, 4])
    assert torch.equal(mean_se(sums, sizes), mean_se(sums[kept], sizes[kept]))
    assert mean_se(sums[:1], sizes[:1]).isnan()
