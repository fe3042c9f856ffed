"""Measures of common neighbours: row by row in plain Python, under ties, and what must and must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from neighbor_tools import cosine_rows, hard_layers, scored, shared_neighbours
from tdprobe import registry
from tdprobe.latent import (
    JaccardEstimator,
    MutualKnnEstimator,
    RankSimilarityEstimator,
    SecondOrderCosineEstimator,
)
from tdprobe.stream.batch import Batch

CLASSES = {
    "mutual_knn": MutualKnnEstimator,
    "jaccard": JaccardEstimator,
    "rank_similarity": RankSimilarityEstimator,
    "second_order_cosine": SecondOrderCosineEstimator,
}
every = pytest.mark.parametrize("name", CLASSES)


def harmonic(x):
    """Return the x-th harmonic number, by Euler's integral where x is no whole number."""
    if x == int(x):
        return sum(1 / i for i in range(1, int(x) + 1))
    t = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    return float(((1 - t**x) / (1 - t)).mean())


def row_term(name, a, b, k, near_a, near_b):
    """Compare the lists of one row, {row: (share, rank)}."""
    common = {j: min(a[j][0], b[j][0]) for j in a.keys() & b.keys()}
    count = sum(common.values())
    if name == "mutual_knn":
        return count / k
    if name == "jaccard":
        return count / sum(max(a.get(j, (0,))[0], b.get(j, (0,))[0]) for j in a.keys() | b.keys())
    if name == "rank_similarity":
        terms = (w * 2 / ((1 + abs(a[j][1] - b[j][1])) * (a[j][1] + b[j][1])) for j, w in common.items())
        return sum(terms) / harmonic(count) if count else 0.0
    union = {j: max(a.get(j, (0,))[0], b.get(j, (0,))[0]) for j in a.keys() | b.keys()}
    dot = sum(w * near_a[j] * near_b[j] for j, w in union.items())
    lengths = [math.sqrt(sum(w * near[j] ** 2 for j, w in union.items())) for near in (near_a, near_b)]
    return dot / (lengths[0] * lengths[1]) if lengths[0] * lengths[1] > 0 else 0.0


def reference(name, x, y, k=10, cosine=None):
    cosine = name == "second_order_cosine" if cosine is None else cosine
    lists = [shared_neighbours(z, k, cosine) for z in (x, y)]
    near = [cosine_rows(z).tolist() for z in (x, y)]
    return [row_term(name, a, b, k, p, q) for a, b, p, q in zip(*lists, *near, strict=True)]


def mean(values):
    return sum(values) / len(values)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n=120, seed=0):
    x = normal(n, 5, seed=seed)
    return x, x[:, :3] + 0.5 * normal(n, 3, seed=seed + 1)


class TestValue:
    @every
    @pytest.mark.parametrize("k", [1, 2, 10])
    def test_agrees_with_going_through_each_row(self, name, k):
        x, y = related()
        found = scored(CLASSES[name](k=k), x, y)
        values = reference(name, x, y, k)
        assert float(found["score"][0, 1]) == pytest.approx(mean(values), rel=1e-9)
        spread = torch.tensor(values, dtype=torch.float64).std() / 120**0.5
        assert float(found["se"][0, 1]) == pytest.approx(float(spread), rel=1e-9)

    @every
    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_both_metrics(self, name, metric):
        x, y = related()
        x, y = x + 1, y + 0.5
        found = float(scored(CLASSES[name](k=6, metric=metric), x, y)["score"][0, 1])
        assert found == pytest.approx(mean(reference(name, x, y, 6, metric == "cosine")), rel=1e-9)

    @every
    @pytest.mark.parametrize("layers", hard_layers())
    def test_hard_layers(self, name, layers):
        x, y = hard_layers(60)[layers]
        found = scored(CLASSES[name](), x, y)["score"]
        # Euler's integral is what limits the reference where shares are parts.
        assert float(found[0, 1]) == pytest.approx(
            mean(reference(name, x, y)), rel=1e-9 if name != "rank_similarity" else 1e-5
        )
        assert torch.equal(found, found.mT)

    def test_by_hand(self):
        # The two nearest in a: 0: {1, 2}, 1: {0, 2}, 2: {1, 0}, 3: {2, 1}; in b: {1, 3}, {3, 0}, {3, 1}, {1, 2}.
        a, b = torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([[0.0], [2.2], [6.5], [4]])
        found = {
            name: scored(cls(k=2, metric="euclidean"), a, b)["score"][0, 1].item() for name, cls in CLASSES.items()
        }
        assert found["mutual_knn"] == pytest.approx((1 + 1 + 1 + 2) / 8)
        assert found["jaccard"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 3 + 1) / 4)
        # Ranks of the common ones: (1, 1); (1, 2); (1, 2); (2, 1) and (1, 2), over H(2) = 3/2.
        terms = [1, 2 / (2 * 3), 2 / (2 * 3), 2 * 2 / (2 * 3) / 1.5]
        assert found["rank_similarity"] == pytest.approx(sum(terms) / 4)

    @every
    def test_a_layer_agrees_with_itself(self, name):
        x = normal(90, 4)
        found = scored(CLASSES[name](), x, 3 * x)
        assert float(found["score"][0, 1]) == pytest.approx(1, abs=1e-12)
        assert float(found["se"][0, 1]) == pytest.approx(0, abs=1e-12)

    def test_independent_layers_have_in_common_what_chance_has(self):
        plain = scored(MutualKnnEstimator(), normal(60, 80, 3), normal(60, 80, 4, seed=1))
        robust = scored(MutualKnnEstimator(mode="robust"), normal(60, 80, 3), normal(60, 80, 4, seed=1))
        for found, expected in ((plain, 10 / 79), (robust, 0)):
            draws = found["score"][:, 0, 1]
            assert float(draws.mean()) == pytest.approx(expected, abs=4 * float(draws.std()) / 60**0.5)
            # The error of one draw, estimated from its rows, is the spread over draws.
            assert float(found["se"][:, 0, 1].mean()) == pytest.approx(float(draws.std()), rel=0.3)

    def test_a_constant_layer_has_in_common_what_chance_has(self):
        found = scored(MutualKnnEstimator(), torch.ones(50, 2), normal(50, 3))["score"]
        assert float(found[0, 1]) == pytest.approx(10 / 49)
        adjusted = scored(MutualKnnEstimator(adjusted=True), torch.ones(50, 2), normal(50, 3))["score"]
        assert float(adjusted[0, 1]) == pytest.approx(0, abs=1e-12)
        assert float(adjusted[0, 0]) == pytest.approx(1)

    @every
    def test_float32_at_an_offset_of_a_thousand_deviations(self, name):
        x, y = related(300)
        if name != "second_order_cosine":
            x, y = x.float() + 1000, y.float() - 1000
            exact = scored(CLASSES[name](), x.double() - 1000, y.double() + 1000)["score"]
        else:
            # Cosines are taken about the origin.
            x, y = x.float() + 1000, y.float() - 1000
            exact = scored(CLASSES[name](), x.double(), y.double())["score"]
        torch.testing.assert_close(scored(CLASSES[name](), x, y)["score"], exact, rtol=1e-4, atol=1e-6)


class TestStream:
    @every
    def test_batches_and_merged_states_give_what_one_shot_gives(self, name):
        x, y = related()
        estimator, ids = CLASSES[name](k=5), torch.arange(120)
        whole = scored(estimator, x, y)["score"]
        states = []
        for part in (slice(0, 50), slice(50, 51), slice(51, 120)):
            batch = Batch({"x": x[part], "y": y[part]}, ids[part])
            states.append(estimator.update(estimator.init(batch), batch))
        merged = states[2].merge(states[0]).merge(states[1])
        assert torch.equal(estimator.score(merged)["score"], whole)
        td = TensorDict({"data_a": x, "data_b": y})
        assert estimator(td)[name].item() == pytest.approx(float(whole[0, 1]), rel=1e-6)

    def test_all_layers_at_once_are_the_pairs_one_by_one(self):
        rows = [x for layers in ("related", "repeated", "lattice") for x in hard_layers(60)[layers]]
        for cls in CLASSES.values():
            whole = scored(cls(k=4), *rows)["score"]
            for a in range(len(rows)):
                pair = scored(cls(k=4), rows[a], rows[-1])["score"]
                torch.testing.assert_close(whole[a, -1], pair[0, 1], rtol=1e-12, atol=1e-12)

    def test_the_registry_streams_them_robustly(self):
        assert registry.streaming("mutual_knn").mode == "robust"
        assert [registry.get(name) for name in CLASSES] == list(CLASSES.values())


class TestEdges:
    @every
    def test_the_order_of_rows_never_matters(self, name):
        g = torch.Generator().manual_seed(0)
        x, y = (torch.randn(70, width, generator=g).relu().round(decimals=1) for width in (3, 5))
        order = torch.randperm(70, generator=g)
        plain, moved = (scored(CLASSES[name](), *rows)["score"] for rows in ((x, y), (x[order], y[order])))
        torch.testing.assert_close(moved, plain, rtol=1e-12, atol=1e-14)

    @every
    def test_nan_in_nan_out(self, name):
        x, y = torch.randn(2, 30, 3), torch.randn(2, 30, 3)
        y[1, 4, 2] = math.nan
        with pytest.warns(UserWarning, match="'data_b' held NaN or infinite values"):
            found = CLASSES[name]()(TensorDict({"data_a": x, "data_b": y}, batch_size=[2]))[name]
        assert found.isnan().tolist() == [False, True]
        scores = scored(CLASSES[name](), x[1], y[1])
        assert scores["score"].isnan().tolist() == [[False, True], [True, True]]

    @every
    def test_arguments(self, name):
        cls = CLASSES[name]
        for bad in (0, 2.5, True):
            with pytest.raises(ValueError, match=f"got k={bad}"):
                cls(k=bad)
        with pytest.raises(ValueError, match="'euclidean'"):
            cls(metric="euclidian")
        with pytest.raises(ValueError, match="'robust'"):
            cls(mode="robusst")
        with pytest.raises(ValueError, match=f"got 11 rows; {name} with k=10 needs at least k\\+2 = 12"):
            scored(cls(), torch.randn(11, 2), torch.randn(11, 2))
        assert cls()(TensorDict({"data_a": torch.zeros(0, 20, 2), "data_b": torch.zeros(0, 20, 3)}))[name].shape == (0,)
        repeated = torch.randn(20, 2).repeat(2, 1)
        assert scored(cls(), repeated, torch.randn(40, 2))["duplicates"].tolist() == [20, 0]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_declared_invariances_hold_and_others_do_not(seed, power):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 80, 4, dtype=torch.float64, generator=g)
    b[:, :2] += 2 * a[:, :2]
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    changed = {
        "permutation": a[:, torch.randperm(4, generator=g)],
        "orthogonal": a @ turn,
        "isotropic scaling": 10**power * a,
        "translation": a + 10 + torch.randn(4, generator=g, dtype=torch.float64),
        "invertible linear": a @ (turn * torch.tensor([1, 1, 30.0, 1], dtype=torch.float64)),
    }
    for cls in CLASSES.values():
        plain = float(scored(cls(), a, b)["score"][0, 1])
        for name, x in changed.items():
            found = float(scored(cls(), x, b)["score"][0, 1])
            if name in cls.spec.invariant_to:
                assert found == pytest.approx(plain, abs=1e-9), (cls.spec.name, name)
            else:
                assert abs(found - plain) > 1e-3, (cls.spec.name, name)
        assert cls.spec.symmetric and cls.spec.bounds[0] <= plain <= cls.spec.bounds[1]
