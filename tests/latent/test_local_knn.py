"""Dimension around each point: by hand, on manifolds, and where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from neighbor_tools import manifolds, neighbour_distances, scored
from tdprobe.latent import LocalKnnDimensionEstimator


def local_knn(x, k="auto", **options):
    estimator = LocalKnnDimensionEstimator(k, **options)
    return estimator(TensorDict({"data": x}, batch_size=x.shape[:-2]))["dimension"]


class TestValue:
    def test_by_hand(self):
        # Evenly spaced points: 2 of 4 neighbours lie within half the distance, but not next to an end.
        second = math.log(2) / math.log(3)
        assert local_knn(torch.arange(7.0).unsqueeze(1), 2).tolist() == pytest.approx([1, second, 1, 1, 1, second, 1])

    @pytest.mark.parametrize("n", [5, 60, 400])
    def test_agrees_with_sorting_all_distances(self, n):
        x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        k = max(2, min(int(n**0.5), (n - 1) // 2))
        inner, outer = neighbour_distances(x, (k, 2 * k)).unbind(1)
        found = scored(LocalKnnDimensionEstimator(), x)
        expected = math.log(2) / (outer / inner).log()
        torch.testing.assert_close(found["pointwise"][0], expected, rtol=1e-9, atol=0)
        assert float(found["score"]) == pytest.approx(float(np.median(expected)), rel=1e-9)
        torch.testing.assert_close(local_knn(x), expected.float())

    @pytest.mark.parametrize("name", ["line", "circle", "sphere", "swiss roll", "cube"])
    def test_the_median_over_a_manifold_is_its_dimension(self, name):
        x, dimension = manifolds(2000)[name]
        # A value is d log 2 / -log Beta(k, k), of standard deviation d / (log 2 sqrt(2 k)); taking only n / 2k of them
        # as independent, the median has a standard error of 1.25 d / (log 2 sqrt(n)). A twentieth for edges.
        tolerance = 4 * 1.25 * dimension / math.log(2) / 2000**0.5 + dimension / 20
        found = scored(LocalKnnDimensionEstimator(k=8, distinct=True), x)["score"]
        assert float(found) == pytest.approx(dimension, abs=tolerance)

    def test_offset_and_half_precision(self):
        x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) + 1000
        torch.testing.assert_close(local_knn(x), local_knn(x.double() - 1000), rtol=1e-5, atol=0)
        half = torch.randn(100, 5).bfloat16()
        torch.testing.assert_close(local_knn(half, 3), local_knn(half.double(), 3), rtol=1e-5, atol=0, equal_nan=True)

    def test_rows_keep_their_places(self):
        x = torch.randn(2, 50, 3)
        order = torch.randperm(50)
        torch.testing.assert_close(local_knn(x[:, order], 4), local_knn(x, 4)[:, order], rtol=1e-6, atol=0)


class TestEdges:
    def test_no_value_where_distances_are_equal_or_missing(self):
        assert local_knn(torch.zeros(10, 2), 2).isnan().all()
        x = torch.randn(10, 3)
        assert local_knn(x.repeat(4, 1), 2).isnan().all()
        assert local_knn(x.repeat(4, 1), 2, distinct=True).isfinite().all()

    def test_distinct_counts_rows_that_are_equal_once(self):
        x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        estimator = LocalKnnDimensionEstimator(k=5, distinct=True)
        plain, repeated = scored(estimator, x), scored(estimator, torch.cat([x, x[:40], x[:40]]))
        assert float(plain["score"]) == pytest.approx(float(repeated["score"]), rel=1e-12)
        torch.testing.assert_close(plain["pointwise"], repeated["pointwise"][:, :100], rtol=1e-12, atol=0)
        assert int(repeated["duplicates"]) == 80

    def test_k_is_checked(self):
        for bad in (2.5, None, "five"):
            with pytest.raises(TypeError, match=r"k must be an integer from 2 on, or 'auto'"):
                LocalKnnDimensionEstimator(k=bad)
        for bad in (1, 0, -3):
            with pytest.raises(ValueError, match="k must be greater than 1"):
                LocalKnnDimensionEstimator(k=bad)
        with pytest.raises(ValueError, match=r"got 10 rows.*k=5 needs at least 2k\+1 = 11"):
            local_knn(torch.randn(10, 3), 5)
        with pytest.raises(ValueError, match=r"got 4 rows.*2k\+1 = 5"):
            local_knn(torch.randn(4, 3))
        assert local_knn(torch.randn(5, 3)).shape == (5,)

    def test_nan_in_nan_out_for_that_data_set(self):
        x = torch.randn(2, 20, 3)
        x[0, 1] = math.nan
        with pytest.warns(UserWarning, match="'data' held NaN"):
            found = local_knn(x)
        assert found[0].isnan().all() and torch.equal(found[1], local_knn(x[1]))

    def test_keys_and_empty_batches(self):
        estimator = LocalKnnDimensionEstimator("auto", ("a", "x"), ("a", "d"))
        td = estimator(TensorDict({"a": {"x": torch.randn(2, 3, 20, 4)}}, batch_size=[2, 3]))
        assert td["a", "d"].shape == (2, 3, 20) and td["a", "d"].dtype == torch.float32
        assert local_knn(torch.zeros(0, 10, 3)).shape == (0, 10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_declared_invariances_hold_and_others_do_not(seed, power):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 4, dtype=torch.float64, generator=g) * torch.tensor([1.0, 1, 3, 9])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    declared = {
        "permutation": x[:, torch.randperm(4, generator=g)],
        "orthogonal": x @ turn,
        "isotropic scaling": 10**power * x,
        "translation": x + 100 * torch.randn(4, generator=g, dtype=torch.float64),
    }
    estimator = LocalKnnDimensionEstimator(4, distinct=True)
    assert set(declared) == estimator.spec.invariant_to
    plain = scored(estimator, x)["pointwise"]
    for changed in declared.values():
        torch.testing.assert_close(scored(estimator, changed)["pointwise"], plain, rtol=1e-7, atol=0)
    stretched = scored(estimator, x * torch.tensor([30.0, 1, 1, 1], dtype=torch.float64))["pointwise"]
    assert float((stretched / plain).log().abs().mean()) > 0.05
