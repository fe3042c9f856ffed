"""Dimension from two neighbours: by hand, on manifolds, under what must and must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from neighbor_tools import manifolds, neighbour_distances, scored
from tdprobe.latent import TwoNnDimensionEstimator
from tdprobe.latent.dimension_estimation.twonn import SPREAD

ROBUST = {"discard": 0.1, "distinct": True}
# Four groups so far apart that they do not see each other; mu is 3, 2, 1.5 in each of them.
GROUPS = (torch.tensor([0.0, 1, 3]) + 1000 * torch.arange(4.0).unsqueeze(1)).reshape(-1, 1)


def twonn(x, **options):
    return TwoNnDimensionEstimator(**options)(TensorDict({"data": x}, batch_size=x.shape[:-2]))["dimension"]


def reference(x, discard=0.0):
    """Fit the line point by point, in plain Python."""
    first, second = neighbour_distances(x, (1, 2)).unbind(1)
    logs = sorted(math.log(b / a) for a, b in zip(first.tolist(), second.tolist(), strict=True))
    n = len(logs)
    kept = min(n - 1, math.floor((1 - discard) * n + 1e-9))
    points = [(logs[i - 1], -math.log(1 - i / n)) for i in range(1, kept + 1)]
    return sum(u * v for u, v in points) / sum(u * u for u, _ in points)


class TestValue:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_by_hand(self, dtype):
        x = [math.log(mu) for mu in [1.5] * 4 + [2.0] * 4 + [3.0] * 3]
        y = [-math.log(1 - i / 12) for i in range(1, 12)]
        slope = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
        td = TwoNnDimensionEstimator(return_xy=True)(TensorDict({"data": GROUPS.to(dtype)}))
        assert td["dimension"].item() == pytest.approx(slope, rel=1e-6)
        assert td["dimension_x"].tolist() == pytest.approx(x, rel=1e-6)
        assert td["dimension_y"].tolist() == pytest.approx(y, rel=1e-6)

    @pytest.mark.parametrize("discard", [0.0, 0.1, 0.5])
    @pytest.mark.parametrize("n", [3, 10, 101, 300])
    def test_agrees_with_a_plain_fit(self, n, discard):
        x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        found = scored(TwoNnDimensionEstimator(discard=discard), x)["score"]
        assert float(found) == pytest.approx(reference(x, discard), rel=1e-9)

    @pytest.mark.parametrize("options", [{}, ROBUST], ids=["strict", "robust"])
    @pytest.mark.parametrize("name", manifolds(3))
    def test_manifolds(self, name, options):
        x, dimension = manifolds(2000)[name]
        # Four standard errors, and a twentieth for edges and curvature, which cost a little of the dimension.
        tolerance = 4 * SPREAD * dimension / 2000**0.5 + dimension / 20
        assert float(twonn(x, **options)) == pytest.approx(dimension, abs=tolerance)

    @pytest.mark.parametrize("options", [{}, ROBUST], ids=["strict", "robust"])
    def test_the_standard_error_is_the_spread_over_data_sets(self, options):
        angle = 2 * torch.pi * torch.rand(80, 400, 2, generator=torch.Generator().manual_seed(1))
        torus = torch.cat([angle.cos(), angle.sin()], -1)
        scores = scored(TwoNnDimensionEstimator(**options), torus)
        # The standard deviation of 80 values is itself known to 8 %: three times that.
        assert float(scores["score"].std()) == pytest.approx(float(scores["se"].mean()), rel=0.25)

    def test_offset_of_a_thousand_deviations(self):
        x = torch.randn(1000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        moved = x.float() + 1000
        assert float(twonn(moved)) == pytest.approx(float(twonn((moved - 1000).double())), rel=1e-6)
        # What float32 itself takes from the input at that offset.
        assert float(twonn(moved)) == pytest.approx(float(twonn(x)), rel=5e-3)

    def test_near_duplicates_keep_their_small_distances(self):
        g = torch.Generator().manual_seed(0)
        base = torch.randn(500, 3, generator=g, dtype=torch.float64)
        x = torch.cat([base, base + 1e-3 * torch.randn(500, 3, generator=g, dtype=torch.float64)]).float() + 10
        assert float(twonn(x)) == pytest.approx(reference(x.double()), rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_counts_in_full(self, dtype):
        x = torch.randn(300, 8).to(dtype)
        found = twonn(x, **ROBUST)
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(twonn(x.double(), **ROBUST)), rel=1e-6)

    def test_integers_count_as_numbers(self):
        x = torch.randint(0, 1000, (60, 3))
        assert torch.equal(twonn(x), twonn(x.float()))


class TestDuplicates:
    def test_strict_neighbours_lie_beyond_eps_and_copies_of_them_count(self):
        # Each point of the groups comes twice, 1e-6 apart: beyond 1e-5 both neighbours are a copied one.
        x = torch.cat([GROUPS.double(), GROUPS.double() + 1e-6])
        td = TwoNnDimensionEstimator(return_xy=True)(TensorDict({"data": x}))
        assert td["dimension_x"].max().item() < 1e-5
        fine = TwoNnDimensionEstimator(return_xy=True, eps=1e-7)(TensorDict({"data": x}))
        assert fine["dimension_x"].min().item() > 10

    def test_distinct_counts_each_row_once_and_says_how_many_it_dropped(self):
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        repeated = torch.cat([x, x[:150], x[:150]])[torch.randperm(500, generator=torch.Generator().manual_seed(1))]
        scores = scored(TwoNnDimensionEstimator(**ROBUST), repeated)
        assert int(scores["duplicates"]) == 300 and int(scores["valid"]) == 200
        plain = scored(TwoNnDimensionEstimator(**ROBUST), x)
        assert float(scores["score"]) == pytest.approx(float(plain["score"]), rel=1e-12)
        assert float(scores["se"]) == pytest.approx(float(plain["se"]), rel=1e-12)

    def test_distinct_has_no_absolute_threshold(self):
        x = torch.randn(200, 4) * 1e-7
        assert float(twonn(x, **ROBUST)) == pytest.approx(float(twonn(x * 2.0**24, **ROBUST)), rel=1e-6)
        with pytest.raises(ValueError, match=r"'data' has 0 valid points.*eps=1e-05"):
            twonn(x)


class TestEdges:
    def test_too_few_points(self):
        with pytest.raises(ValueError, match="got 2 rows.*at least 3 points"):
            twonn(torch.randn(2, 3))
        with pytest.raises(ValueError, match="0 valid points"):
            twonn(torch.zeros(10, 3))
        with pytest.raises(ValueError, match="'data' has 0 valid points"):
            twonn(torch.stack([torch.randn(10, 3), torch.ones(10, 3)]))
        assert twonn(torch.randn(3, 3)).isfinite()

    def test_a_lattice_has_no_slope(self):
        assert twonn(torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))).isnan()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_in_nan_out_with_one_warning_that_names_the_key(self, value):
        x = torch.randn(2, 20, 3)
        x[1, 4, 2] = value
        with pytest.warns(UserWarning, match="'data' held NaN or infinite values") as caught:
            found = twonn(x)
        assert len(caught) == 1
        assert found.isnan().tolist() == [False, True] and torch.equal(found[0], twonn(x[0]))

    def test_leading_dimensions_and_padding(self):
        x = torch.randn(2, 3, 30, 4)
        td = TwoNnDimensionEstimator(out_key=("out", "d"), return_xy=True)(TensorDict({"data": x}, batch_size=[2, 3]))
        assert td["out", "d"].shape == (2, 3) and td["out", "d_x"].shape == td["out", "d_y"].shape == (
            2,
            3,
            29,
        )
        assert torch.equal(td["out", "d"][1, 2], twonn(x[1, 2]))
        fit = TwoNnDimensionEstimator(return_xy=True, discard=0.5)(TensorDict({"data": x[0, 0]}))
        assert fit["dimension_x"].isnan().tolist() == fit["dimension_y"].isnan().tolist() == [False] * 15 + [True] * 14

    def test_an_empty_batch_gives_an_empty_result(self):
        assert twonn(torch.zeros(0, 10, 3)).shape == (0,)

    def test_arguments(self):
        estimator = TwoNnDimensionEstimator(return_xy=True)
        assert estimator.in_keys == ["data"] and estimator.out_keys == [
            "dimension",
            "dimension_x",
            "dimension_y",
        ]
        assert repr(estimator).startswith("TwoNnDimensionEstimator(in_key='data', out_key='dimension', return_xy=True")
        with pytest.raises(ValueError, match="discard=1.0"):
            TwoNnDimensionEstimator(discard=1.0)
        with pytest.raises(ValueError, match="eps=nan"):
            TwoNnDimensionEstimator(eps=math.nan)
        with pytest.raises(TypeError):
            TwoNnDimensionEstimator("data", "dimension", False, 1e-5, 0.1)


class TestInvariance:
    x = torch.randn(120, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 7)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-3, 3))
    def test_declared_ones_hold(self, seed, power):
        g = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
        declared = {
            "permutation": self.x[:, torch.randperm(6, generator=g)],
            "orthogonal": self.x @ turn,
            "isotropic scaling": 10**power * self.x,
            "translation": self.x + 100 * torch.randn(6, generator=g, dtype=torch.float64),
        }
        assert set(declared) == TwoNnDimensionEstimator.spec.invariant_to
        plain = float(scored(TwoNnDimensionEstimator(**ROBUST), self.x)["score"])
        for name, changed in declared.items():
            found = float(scored(TwoNnDimensionEstimator(**ROBUST), changed)["score"])
            assert found == pytest.approx(plain, rel=1e-8), name
        order = torch.randperm(120, generator=g)
        assert float(scored(TwoNnDimensionEstimator(), self.x[order])["score"]) == pytest.approx(
            reference(self.x), rel=1e-9
        )

    def test_others_do_not(self):
        stretched = self.x @ torch.diag(torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64))
        assert abs(float(twonn(stretched)) - float(twonn(self.x))) > 0.1
