"""Information imbalance: closed forms, known figures, ties, and the helpers that document its meaning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from neighbor_tools import TIE, distances, hard_layers, imbalance, scored, shared_neighbours
from tdprobe.latent import InformationImbalanceEstimator
from tdprobe.latent.representation_similarity.information_imbalance import (
    _as_distance_input_dtype,
    _compute_ranks_from_dist,
    _directional_imbalance,
    _information_imbalance,
    _validate_inputs,
)


def both_ways(a, b, **options):
    td = TensorDict({"data_a": a, "data_b": b}, batch_size=a.shape[:-2])
    InformationImbalanceEstimator(**options)(td)
    return td["information_imbalance_a_to_b"], td["information_imbalance_b_to_a"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestValue:
    @pytest.mark.parametrize("n", [2, 3, 50, 301])
    def test_identical_inputs_reach_the_minimum_exactly(self, n):
        x = normal(n, 4).float()
        expected = torch.tensor(2 / n)
        assert both_ways(x, x.clone()) == (expected, expected)
        # Any monotone function of the distances keeps the ranks.
        assert both_ways(x, -3 * x + 1e3) == (expected, expected)

    def test_two_samples_know_nothing(self):
        assert both_ways(normal(2, 3), normal(2, 1)) == (torch.tensor(1.0), torch.tensor(1.0))

    def test_by_hand(self):
        a, b = torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([[0.0], [10], [1], [3]])
        # Nearest in a: 0 -> 1, 1 -> 0, 3 -> 1, 7 -> 3; their ranks in b are 3, 3, 3 and 1.
        # Nearest in b: 0 -> 3 (of a), 1 -> 7, 3 -> 0, 7 -> 3; their ranks in a are 2, 3, 2 and 1.
        assert [value.item() for value in both_ways(a, b)] == [2 / 4 * 10 / 4, 2 / 4 * 8 / 4]

    def test_independent_layers_score_one(self):
        found = scored(InformationImbalanceEstimator(), normal(40, 200, 3), normal(40, 200, 5, seed=1))["score"]
        for a, b in ((0, 1), (1, 0)):
            values = found[:, a, b]
            assert float(values.mean()) == pytest.approx(1, abs=4 * float(values.std()) / 40**0.5)

    def test_a_flat_gaussian_has_the_published_figures(self):
        # Glielmo et al. 2022, figure 1: standard deviations 1, 1, 0.2 and a thousand samples; theirs is one draw.
        x = normal(24, 1000, 3) * torch.tensor([1, 1, 0.2])
        found = scored(InformationImbalanceEstimator(), x, x[..., :2], x[..., 2:])["score"]
        published = {(0, 1): 0.006, (1, 0): 0.025, (0, 2): 0.32, (2, 0): 0.96}
        for (a, b), value in published.items():
            draws = found[:, a, b]
            # Three standard deviations of a draw, and what rounding to the last digit leaves open.
            digit = 10.0 ** -len(str(value).split(".")[1]) / 2
            assert float(draws.mean()) == pytest.approx(value, abs=3 * float(draws.std()) + digit), (a, b)

    @pytest.mark.parametrize("name", hard_layers())
    def test_agrees_with_ranking_row_by_row(self, name):
        a, b = hard_layers()[name]
        found = both_ways(a, b)
        assert [value.item() for value in found] == pytest.approx([imbalance(a, b), imbalance(b, a)], abs=1e-7)

    def test_offset_of_a_thousand_deviations_costs_nothing(self):
        a, b = normal(300, 6), normal(300, 4, seed=1)
        b[:, :3] += a[:, :3]
        moved = both_ways((a + 1000).float(), (b - 1000).float())
        exact = (
            imbalance((a + 1000).float(), (b - 1000).float()),
            imbalance((b - 1000).float(), (a + 1000).float()),
        )
        assert [value.item() for value in moved] == pytest.approx(list(exact), abs=1e-7)

    def test_near_duplicates_find_each_other(self):
        base = normal(200, 20).float() + 10
        a = torch.cat([base, base + 1e-6 * normal(200, 20, seed=1).float()])
        b = torch.cat([normal(200, 3, seed=2)] * 2) + 1e-9 * normal(400, 3, seed=3)
        assert both_ways(a, b)[0].item() == pytest.approx(2 / 400)


def shared_ranks(a, b, k):
    """Average, row by row, the ranks in b of the k nearest rows in a, by their shares."""
    total, n = 0.0, len(a)
    for i, (near, row) in enumerate(zip(shared_neighbours(a, k), distances(b), strict=True)):
        row = row.numpy()
        others = np.delete(row, i)
        for j, (share, _) in near.items():
            nearer, upto = (others < row[j] * (1 - TIE)).sum(), (others <= row[j] * (1 + TIE)).sum()
            total += share * float(nearer + upto + 1) / 2
    return 2 / n**2 / k * total


class TestSeveralNeighbours:
    def test_by_hand(self):
        a, b = torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([[0.0], [10], [1], [3]])
        # Two nearest in a: 1 and 3, 0 and 3, 1 and 0, 3 and 1; their ranks in b 3 + 1, 3 + 2, 3 + 1 and 1 + 3.
        assert both_ways(a, b, k=2)[0].item() == pytest.approx(2 / 4 * (4 + 5 + 4 + 4) / 8)

    @pytest.mark.parametrize("k", [2, 3, 10])
    @pytest.mark.parametrize("name", hard_layers())
    def test_agrees_with_ranking_row_by_row(self, name, k):
        a, b = hard_layers(60)[name]
        n, found = len(a), scored(InformationImbalanceEstimator(k=k), a, b)["score"]
        assert found.flatten().tolist() == pytest.approx([shared_ranks(x, y, k) for x in (a, b) for y in (a, b)])
        if name == "ordinary":
            assert found.diagonal().tolist() == pytest.approx([(k + 1) / n] * 2)

    def test_one_neighbour_by_this_way_is_one_neighbour(self):
        from tdprobe.stats.neighborhoods import mean_terms
        from tdprobe.stats.neighbors import Neighbors
        from tdprobe.stats.ranks_elsewhere import RanksElsewhere

        for a, b in hard_layers().values():
            table = Neighbors((1, 2), imbalance=True, places=1).of_rows([a, b])
            score, se = mean_terms(table, 1, RanksElsewhere(1))
            torch.testing.assert_close(score, table.imbalance, rtol=1e-12, atol=0, equal_nan=True)
            torch.testing.assert_close(se, table.imbalance_se, rtol=1e-6, atol=1e-9, equal_nan=True)

    def test_more_neighbours_vary_less_from_sample_to_sample(self):
        x, y = normal(30, 200, 3), normal(30, 200, 3, seed=1)
        spread = [scored(InformationImbalanceEstimator(k=k), x, x + y)["score"][:, 0, 1].std() for k in (1, 8)]
        errors = [scored(InformationImbalanceEstimator(k=k), x, x + y)["se"][:, 0, 1].mean() for k in (1, 8)]
        assert spread[1] < 0.7 * spread[0] and errors[1] < 0.7 * errors[0]

    @pytest.mark.parametrize("options", [{"k": 0}, {"k": True}, {"k": 1.5}, {"k": 2, "p": 1.0}])
    def test_arguments(self, options):
        with pytest.raises(ValueError, match=f"got k={options['k']}"):
            InformationImbalanceEstimator(**options)

    def test_too_few_rows_and_layers_that_are_not_finite(self):
        with pytest.raises(ValueError, match="got 4 rows; information_imbalance with k=3 needs at least 5"):
            both_ways(normal(4, 2), normal(4, 2), k=3)
        bad = normal(3, 20, 2)
        bad[1, 5, 0] = math.nan
        found = scored(InformationImbalanceEstimator(k=3), *bad)["score"]
        assert found[1].isnan().all() and found[:, 1].isnan().all()
        assert float(found[0, 2]) == pytest.approx(shared_ranks(bad[0], bad[2], 3))


class TestTies:
    def test_constant_layers_know_nothing_and_are_not_known(self):
        x = normal(50, 2)
        one = torch.tensor(1.0)
        assert both_ways(torch.ones(50, 2), torch.ones(50, 3)) == (one, one)
        assert both_ways(torch.ones(50, 2, dtype=torch.float64), x) == (one, one)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6))
    def test_the_order_of_rows_never_matters(self, seed):
        g = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(60, width, generator=g).relu().round(decimals=1) for width in (3, 5))
        order = torch.randperm(60, generator=g)
        for x, y in zip(both_ways(a, b), both_ways(a[order], b[order]), strict=True):
            assert x.item() == pytest.approx(y.item(), rel=1e-6)

    def test_tied_neighbours_count_by_their_mean(self):
        # Row 0 has both others at distance 1 in a; in b they are at 1 and 5: ranks 1 and 2, the mean of which is 1.5.
        a, b = torch.tensor([[0.0], [1], [-1]]), torch.tensor([[0.0], [1], [5]])
        assert both_ways(a, b)[0].item() == pytest.approx(2 / 3 * (1.5 + 1 + 2) / 3)
        # Back, row 0 and 1 are each other's nearest, row 2 has row 1 nearest: ranks in a are 1.5, 1 and 2.
        assert both_ways(a, b)[1].item() == pytest.approx(2 / 3 * (1.5 + 1 + 2) / 3)


class TestEdges:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_in_nan_out_with_one_warning_that_names_the_key(self, value):
        a, b = torch.randn(2, 20, 3), torch.randn(2, 20, 3)
        b[1, 4, 2] = value
        with pytest.warns(UserWarning, match="'data_b' held NaN or infinite values") as caught:
            found = both_ways(a, b)
        assert len(caught) == 1
        assert all(x.isnan().tolist() == [False, True] for x in found)
        assert found[0][0] == both_ways(a[0], b[0])[0]

    def test_sample_counts(self):
        with pytest.raises(ValueError, match="got 1 rows; information_imbalance needs at least 2"):
            both_ways(torch.randn(1, 3), torch.randn(1, 3))
        with pytest.raises(ValueError, match="'data_a' has number of samples 5 and 'data_b' has 4"):
            both_ways(torch.randn(5, 3), torch.randn(4, 3))
        assert [x.shape for x in both_ways(torch.zeros(0, 9, 3), torch.zeros(0, 9, 2))] == [(0,), (0,)]

    def test_arguments(self):
        keys = ["information_imbalance_a_to_b", "information_imbalance_b_to_a"]
        estimator = InformationImbalanceEstimator(p=1.0)
        assert estimator.in_keys == ["data_a", "data_b"] and estimator.out_keys == keys and estimator.p == 1.0
        for bad in (-1.0, math.nan):
            with pytest.raises(ValueError, match=f"p={bad}"):
                InformationImbalanceEstimator(p=bad)
        with pytest.raises(TypeError):
            InformationImbalanceEstimator("a", "b", "c", "d", 2.0, 100)

    def test_other_norms(self):
        a, b = normal(60, 4), normal(60, 4, seed=1)
        b[:, :2] += a[:, :2]
        found = {p: both_ways(a, b, p=p)[0].item() for p in (1.0, 2.0, 4.0, math.inf)}
        assert found == pytest.approx({p: imbalance(a, b, p) for p in found}, abs=1e-7)
        assert len(set(found.values())) == len(found)

    def test_half_precision_counts_in_full_and_results_are_float32(self):
        a, b = torch.randn(100, 5).bfloat16(), torch.randn(100, 5).half()
        found = both_ways(a, b)
        assert [x.dtype for x in found] == [torch.float32] * 2
        assert found == both_ways(a.double(), b.double())


class TestHelpers:
    def test_inputs_are_validated(self):
        x = torch.randn(10, 3)
        assert _validate_inputs(x, torch.randn(10, 2)) is None
        cases = {
            r"x has shape \(10,\)": (x[:, 0], x),
            "x has 10 samples and y 9": (x, x[:9]),
            r"leading dimensions \(\) and y \(2,\)": (x, torch.randn(2, 10, 3)),
            "at least 2": (x[:1], x[:1]),
            "x is on cpu and y on meta": (x, x.to("meta")),
        }
        for message, pair in cases.items():
            with pytest.raises(ValueError, match=message):
                _validate_inputs(*pair)

    def test_ranks(self):
        dist = torch.tensor([[0.0, 5, 2], [5, 0, 5], [2, 5, 0]])
        assert _compute_ranks_from_dist(dist).tolist() == [[0, 2, 1], [1.5, 0, 1.5], [1, 2, 0]]
        x = normal(30, 2)
        order = distances(x).argsort(1).argsort(1).double()
        assert torch.equal(_compute_ranks_from_dist(distances(x)), order)
        assert torch.equal(_compute_ranks_from_dist(distances(x).expand(2, 30, 30))[1], order)
        # Another row at distance zero is not the row itself.
        assert _compute_ranks_from_dist(torch.zeros(3, 3)).tolist() == [
            [0, 1.5, 1.5],
            [1.5, 0, 1.5],
            [1.5, 1.5, 0],
        ]

    def test_dtype(self):
        def dtype(a, b):
            return _as_distance_input_dtype(torch.zeros(2, 2, dtype=a), torch.zeros(2, 2, dtype=b))

        assert dtype(torch.int64, torch.int64) == dtype(torch.bfloat16, torch.float16) == torch.float32
        assert dtype(torch.float32, torch.float64) == dtype(torch.int32, torch.float64) == torch.float64

    @pytest.mark.parametrize("name", ["ordinary", "related", "repeated", "binary", "constant", "lattice"])
    def test_they_say_what_the_estimator_computes(self, name):
        a, b = hard_layers()[name]
        ranks = [_compute_ranks_from_dist(distances(x)) for x in (a, b)]
        by_ranks = [_directional_imbalance(*ranks), _directional_imbalance(*ranks[::-1])]
        found = both_ways(a, b)
        assert [x.item() for x in found] == pytest.approx([x.item() for x in by_ranks], rel=1e-6)
        whole = _information_imbalance(a, b, p=2.0)
        assert [x.item() for x in whole] == pytest.approx([x.item() for x in found], rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_declared_invariances_hold_and_others_do_not(seed, power):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 80, 4, dtype=torch.float64, generator=g)
    # b is mostly two columns of a; stretching another one hides them, and a then knows next to nothing of b.
    b = 0.3 * b + a * torch.tensor([1, 1, 0, 0])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    declared = {
        "permutation": a[:, torch.randperm(4, generator=g)],
        "orthogonal": a @ turn,
        "isotropic scaling": 10**power * a,
        "translation": a + 100 * torch.randn(4, generator=g, dtype=torch.float64),
    }
    spec = InformationImbalanceEstimator.spec
    assert set(declared) == spec.invariant_to and not spec.symmetric
    plain = both_ways(a, b)
    assert all(both_ways(changed, b) == plain for changed in declared.values())
    stretched = both_ways(a * torch.tensor([1, 1, 1000.0, 1]), b)
    assert stretched[0] - plain[0] > 0.2 and plain[0] != plain[1]
    assert all(spec.bounds[0] < float(x) < spec.bounds[1] for x in plain)
