"""MLE, GRIDE, correlation integral, local PCA and the likelihood of two neighbours: plain references and manifolds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from neighbor_tools import distances, hard_layers, manifolds, neighbour_distances, scored
from tdprobe import registry
from tdprobe.latent import (
    CorrelationDimensionEstimator,
    GrideDimensionEstimator,
    LocalKnnDimensionEstimator,
    LocalPcaDimensionEstimator,
    MleDimensionEstimator,
    TwoNnDimensionEstimator,
)
from tdprobe.stream.batch import Batch

CLASSES = {
    "mle": MleDimensionEstimator,
    "gride": GrideDimensionEstimator,
    "corr_int": CorrelationDimensionEstimator,
    "local_pca": LocalPcaDimensionEstimator,
}
every = pytest.mark.parametrize("name", CLASSES)
SINGLE = {f"{name}, {side}": pair[side == "b"] for name, pair in hard_layers().items() for side in "ab"}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points_of(x):
    x = x if x.shape[1] else torch.zeros(len(x), 1)
    return torch.unique(x, dim=0).double()


def near(x, k):
    """List the distances of each distinct row to its k nearest, as Python numbers; none where there are fewer."""
    points = points_of(x)
    return neighbour_distances(points, range(1, k + 1)).tolist() if len(points) > k else []


def mle(x, k=20, combine="pooled"):
    inverse = [sum(math.log(row[-1] / r) for r in row[:-1]) / (k - 1) for row in near(x, k)]
    inverse = [max(value, 0.0) for value in inverse]
    if not inverse or sum(inverse) == 0:
        return math.nan
    return {
        "pooled": lambda: len(inverse) / sum(inverse),
        "average": lambda: sum(1 / value for value in inverse) / len(inverse),
        "median": lambda: float(np.median([1 / value if value else math.inf for value in inverse])),
    }[combine]()


def gride(x, n1):
    """Halve an interval around the root of the derivative of the likelihood."""
    logs = [math.log(row[2 * n1 - 1] / row[n1 - 1]) for row in near(x, 2 * n1)]
    n, low, high = len(logs), 1e-9, 1e12
    if n < 2 or sum(logs) == 0:
        return math.nan, math.nan

    def g(u, d):
        return u / -math.expm1(-d * u) if d * u > 0 else 1 / d

    for _ in range(300):
        d = math.sqrt(low * high)
        slope = (n - 1) / d + (n1 - 1) * sum(g(u, d) for u in logs) - (2 * n1 - 1) * sum(logs)
        low, high = (d, high) if slope > 0 else (low, d)
    information = n / d**2 + (n1 - 1) * sum(g(u, d) ** 2 * math.exp(-d * u) for u in logs)
    return d, information**-0.5


def corr_int(x, k1=10, k2=20):
    rows = near(x, k2)
    if not rows:
        return math.nan
    radii = [float(np.median([row[k - 1] for row in rows])) for k in (k1, k2)]
    apart = distances(points_of(x)).fill_diagonal_(math.inf)
    counts = [int((apart < radius * (1 - 1e-12)).sum()) for radius in radii]
    if radii[0] >= radii[1] or counts[0] == 0:
        return math.nan
    return math.log(counts[1] / counts[0]) / math.log(radii[1] / radii[0])


def components(v, rule, alpha):
    """Count the components of one point by the rule, from its variances."""
    total = v.sum()
    if rule == "fo":
        return int((v > alpha * v[0]).sum())
    if rule == "ratio":
        return next(i + 1 for i in range(len(v)) if i + 1 == len(v) or v[: i + 1].sum() >= alpha * total)
    if rule == "maxgap":
        return max(range(len(v) - 1), key=lambda i: v[i] / v[i + 1]) + 1
    first = next(i for i in range(len(v)) if v[: i + 1].sum() > 0.95 * total)
    v = v - v[first:].mean()
    for i in range(len(v)):
        if v[: i + 1].sum() > 0.8 * v.sum() or (i + 1 < len(v) and v[i] / v[i + 1] > alpha):
            return i + 1
    return len(v)


def local_pca(x, k, rule, alpha):
    found = []
    for row in distances(x):
        others = x[row.argsort()[1 : k + 1]].numpy()
        v = np.linalg.svd(others - others.mean(0), compute_uv=False)[: min(k - 1, x.shape[1])] ** 2
        found.append(components(v, rule, alpha))
    return found


class TestMle:
    @pytest.mark.parametrize("combine", ["pooled", "average", "median"])
    @pytest.mark.parametrize("k", [2, 5, 20])
    def test_agrees_with_going_through_each_row(self, k, combine):
        x = normal(200, 4)
        found = scored(MleDimensionEstimator(k=k, combine=combine), x)
        assert float(found["score"]) == pytest.approx(mle(x, k, combine), rel=1e-9)
        assert float(found["se"]) == pytest.approx(1.5 * mle(x, k, combine) / (200 * (k - 1)) ** 0.5)

    @pytest.mark.parametrize("name", SINGLE)
    def test_hard_layers(self, name):
        found = float(scored(MleDimensionEstimator(), SINGLE[name])["score"])
        assert found == pytest.approx(mle(SINGLE[name]), rel=1e-9, nan_ok=True)

    def test_by_hand(self):
        # Distances 1 and 2, 1 and 1, 1 and 2: log 2 + 0 + log 2 over three points.
        x = torch.tensor([[0.0], [1], [2]])
        td = MleDimensionEstimator(k=2, return_pointwise=True)(TensorDict({"data": x}))
        assert td["dimension"].item() == pytest.approx(3 / (2 * math.log(2)))
        assert td["dimension_pointwise"].tolist() == pytest.approx([1 / math.log(2), math.inf, 1 / math.log(2)])


class TestGride:
    def test_every_scale_agrees_with_halving_an_interval(self):
        x = normal(200, 3)
        found = scored(GrideDimensionEstimator(), x)
        assert found["ranks"].tolist() == [1, 2, 4, 8, 16, 32]
        for place, n1 in enumerate(found["ranks"].tolist()):
            score, error = gride(x, n1)
            assert float(found["scales"][0, place]) == pytest.approx(score, rel=1e-9)
            assert float(found["scales_se"][0, place]) == pytest.approx(error, rel=1e-6)
        assert float(found["score"]) == float(found["scales"][0, 1])
        assert float(found["se"]) == pytest.approx(1.5 * float(found["scales_se"][0, 1]))

    @pytest.mark.parametrize("name", SINGLE)
    def test_hard_layers(self, name):
        found = float(scored(GrideDimensionEstimator(n1=4), SINGLE[name])["score"])
        assert found == pytest.approx(gride(SINGLE[name], 4)[0], rel=1e-9, nan_ok=True)

    def test_the_first_scale_is_the_likelihood_of_two_neighbours(self):
        x = normal(150, 4)
        first = scored(GrideDimensionEstimator(n1=1), x)
        two = scored(TwoNnDimensionEstimator(method="ml"), x)
        assert float(first["score"]) == pytest.approx(float(two["score"]), rel=1e-12)

    def test_noise_shows_at_small_scales_only(self):
        x, d = manifolds(2000)["sphere"]
        found = scored(GrideDimensionEstimator(range_max=128), x + 0.03 * normal(2000, 3))["scales"][0]
        assert found[0] > 2.1 and float(found[-1]) == pytest.approx(d, rel=0.05)

    def test_scales_go_as_far_as_the_rows(self):
        td = GrideDimensionEstimator(return_scales=True)(TensorDict({"data": torch.randn(2, 16, 3)}, batch_size=[2]))
        assert td["dimension_scales"].shape == td["dimension_scales_se"].shape == (2, 3)
        with pytest.raises(ValueError, match="got 16 rows; gride with n1=8 needs at least 17"):
            scored(GrideDimensionEstimator(n1=8), torch.randn(16, 3))


class TestCorrelationDimension:
    @pytest.mark.parametrize("n", [100, 101])
    def test_agrees_with_counting_all_pairs(self, n):
        x = normal(n, 4)
        assert float(scored(CorrelationDimensionEstimator(), x)["score"]) == pytest.approx(corr_int(x), rel=1e-9)
        found = scored(CorrelationDimensionEstimator(k1=1, k2=30), x)["score"]
        assert float(found) == pytest.approx(corr_int(x, 1, 30), rel=1e-9)

    @pytest.mark.parametrize("name", SINGLE)
    def test_hard_layers(self, name):
        found = float(scored(CorrelationDimensionEstimator(), SINGLE[name])["score"])
        assert found == pytest.approx(corr_int(SINGLE[name]), rel=1e-9, nan_ok=True)


class TestLocalPca:
    @pytest.mark.parametrize(("rule", "alpha"), [("fo", 0.05), ("ratio", 0.95), ("maxgap", 0.0), ("fan", 10.0)])
    @pytest.mark.parametrize(("k", "d"), [(12, 5), (8, 20)])
    def test_agrees_with_decomposing_each_neighbourhood(self, rule, alpha, k, d):
        x = normal(100, d) * torch.logspace(0, -2, d, dtype=torch.float64)
        found = scored(LocalPcaDimensionEstimator(k=k, rule=rule), x)
        expected = local_pca(x, k, rule, alpha)
        assert found["pointwise"][0].tolist() == expected
        assert float(found["score"]) == pytest.approx(sum(expected) / 100)
        assert float(found["se"]) == pytest.approx(1.5 * float(np.std(expected, ddof=1)) / 10)

    @pytest.mark.parametrize("rule", ["fo", "ratio", "maxgap"])
    def test_a_flat_sheet_in_many_dimensions(self, rule):
        x = torch.rand(300, 3, generator=torch.Generator().manual_seed(0)).double() @ normal(3, 60)
        found = scored(LocalPcaDimensionEstimator(k=40, rule=rule, alpha=0.999 if rule == "ratio" else None), x)
        assert bool((found["pointwise"] <= 3).all())
        assert float(found["score"]) == pytest.approx(3, abs=0.05)

    @pytest.mark.parametrize("name", ["repeated, a", "near duplicates, a", "offset, a", "scales, a", "scales, b"])
    def test_hard_layers_count_equal_rows_once_at_any_scale(self, name):
        x = points_of(SINGLE[name])
        x = (x - x.mean(0)) / x.std()
        found = float(scored(LocalPcaDimensionEstimator(k=15), SINGLE[name])["score"])
        assert found == pytest.approx(sum(local_pca(x, 15, "fo", 0.05)) / len(x), rel=1e-9)

    def test_layers_without_enough_distinct_rows_have_none(self):
        assert scored(LocalPcaDimensionEstimator(k=20), SINGLE["binary, a"])["score"].isnan().all()


class TestTwoNnByLikelihood:
    def logs(self, x, distinct=True):
        first, second = neighbour_distances(x, (1, 2), distinct).unbind(1)
        return sorted((second / first).log().tolist())

    def test_likelihood(self):
        x = normal(150, 4)
        found = scored(TwoNnDimensionEstimator(method="ml"), x)
        assert float(found["score"]) == pytest.approx(149 / sum(self.logs(x)), rel=1e-9)

    @pytest.mark.parametrize("discard", [0.1, 0.5])
    def test_censored_likelihood(self, discard):
        x = normal(150, 4)
        kept = round((1 - discard) * 150)
        logs = self.logs(x)
        total = sum(logs[:kept]) + (150 - kept) * logs[kept - 1]
        ml = scored(TwoNnDimensionEstimator(method="ml", discard=discard), x)
        bayes = scored(TwoNnDimensionEstimator(method="bayes", discard=discard), x)
        assert float(ml["score"]) == pytest.approx((kept - 1) / total, rel=1e-9)
        assert float(bayes["score"]) == pytest.approx((2 + kept) / (5 + total), rel=1e-9)
        assert float(bayes["se"]) == pytest.approx(1.5 * (2 + kept) ** 0.5 / (5 + total), rel=1e-9)

    def test_modes_set_what_is_not_given(self):
        x = torch.cat([normal(100, 3), normal(100, 3)])
        robust = scored(TwoNnDimensionEstimator(mode="robust"), x)["score"]
        assert torch.equal(robust, scored(TwoNnDimensionEstimator(discard=0.1, distinct=True), x)["score"])
        mixed = scored(TwoNnDimensionEstimator(discard=0.0, mode="robust"), x)["score"]
        assert torch.equal(mixed, scored(TwoNnDimensionEstimator(distinct=True), x)["score"])
        assert float(robust) != float(mixed)
        local = LocalKnnDimensionEstimator(k=4, mode="robust")
        assert torch.equal(
            scored(local, x)["score"], scored(LocalKnnDimensionEstimator(k=4, distinct=True), x)["score"]
        )
        estimator = TwoNnDimensionEstimator(mode="robust")
        assert (estimator.discard, estimator.distinct) == (None, None)
        with pytest.raises(ValueError, match="'bayes'"):
            TwoNnDimensionEstimator(method="bays")

    def test_a_lattice_has_none(self):
        x = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
        assert scored(TwoNnDimensionEstimator(method="ml"), x)["score"].isnan().all()


ESTIMATES = {
    "mle": MleDimensionEstimator(k=10),
    "gride": GrideDimensionEstimator(),
    "corr_int": CorrelationDimensionEstimator(),
    "local_pca": LocalPcaDimensionEstimator(k=30, rule="maxgap"),
    "ml": TwoNnDimensionEstimator(method="ml", mode="robust"),
    "bayes": TwoNnDimensionEstimator(method="bayes", mode="robust"),
}


class TestManifolds:
    @pytest.mark.parametrize("name", ["line", "circle", "sphere", "swiss roll", "cube"])
    @pytest.mark.parametrize("label", ESTIMATES)
    def test_dimension(self, label, name):
        x, d = manifolds(2000)[name]
        found = scored(ESTIMATES[label], x)
        # Four standard errors, and a tenth for edges and curvature, which larger neighbourhoods see more of.
        tolerance = 4 * float(found["se"]) + d / 10
        assert float(found["score"]) == pytest.approx(d, abs=tolerance)

    @pytest.mark.parametrize("label", [label for label in ESTIMATES if label != "local_pca"])
    def test_the_standard_error_is_the_spread_over_data_sets(self, label):
        angle = 2 * torch.pi * torch.rand(60, 300, 2, generator=torch.Generator().manual_seed(1))
        found = scored(ESTIMATES[label], torch.cat([angle.cos(), angle.sin()], -1))
        # The standard deviation of 60 values is itself known to 9 %; three times that, and what 1.5 is too much.
        assert 0.6 < float(found["score"].std()) / float(found["se"].mean()) < 1.3


class TestAll:
    @every
    def test_float32_at_an_offset_of_a_thousand_deviations(self, name):
        x = normal(400, 4).float() + 1000
        exact = scored(CLASSES[name](), x.double() - 1000)["score"]
        torch.testing.assert_close(scored(CLASSES[name](), x)["score"], exact, rtol=1e-4, atol=0)

    @every
    def test_batches_and_merged_states_give_what_one_shot_gives(self, name):
        x, estimator, ids = normal(90, 3), CLASSES[name](), torch.arange(90)
        states = []
        for part in (slice(0, 40), slice(40, 41), slice(41, 90)):
            batch = Batch({"x": x[part], "y": 2 * x[part]}, ids[part])
            states.append(estimator.update(estimator.init(batch), batch))
        merged = estimator.score(states[2].merge(states[0]).merge(states[1]))["score"]
        assert torch.equal(merged, scored(estimator, x, 2 * x)["score"])
        found = estimator(TensorDict({"data": x}))["dimension"]
        assert found.item() == pytest.approx(float(merged[0]), rel=1e-6)

    @every
    def test_repeated_rows_count_once(self, name):
        x = normal(100, 3)
        plain, repeated = scored(CLASSES[name](), x), scored(CLASSES[name](), torch.cat([x, x[:40], x[:40]]))
        assert int(repeated["duplicates"]) == 80
        assert float(repeated["score"]) == pytest.approx(float(plain["score"]), rel=1e-9)
        assert float(repeated["se"]) == pytest.approx(float(plain["se"]), rel=1e-9)

    @every
    def test_nan_in_nan_out(self, name):
        x = torch.randn(2, 80, 3)
        x[0, 1] = math.nan
        with pytest.warns(UserWarning, match="'data' held NaN"):
            found = CLASSES[name]()(TensorDict({"data": x}, batch_size=[2]))["dimension"]
        assert found.isnan().tolist() == [True, False]
        assert torch.equal(found[1], CLASSES[name]()(TensorDict({"data": x[1]}))["dimension"])

    @every
    def test_empty_batches_and_too_few_rows(self, name):
        assert CLASSES[name]()(TensorDict({"data": torch.zeros(0, 80, 3)}))["dimension"].shape == (0,)
        with pytest.raises(ValueError, match=f"got 4 rows; {name} with"):
            scored(CLASSES[name](), torch.randn(4, 3))
        assert scored(CLASSES[name](), torch.ones(80, 3))["score"].isnan().all()

    @pytest.mark.parametrize("name", ["mle", "local_pca"])
    def test_values_of_points_keep_their_places(self, name):
        x = torch.randn(2, 70, 3, generator=torch.Generator().manual_seed(0))
        order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
        estimator = CLASSES[name](return_pointwise=True)
        plain, moved = (estimator(TensorDict({"data": z}))["dimension_pointwise"] for z in (x, x[:, order]))
        torch.testing.assert_close(moved, plain[:, order], rtol=1e-6, atol=0)

    def test_arguments(self):
        wrong = {
            "got k=1": lambda: MleDimensionEstimator(k=1),
            "'pooled'": lambda: MleDimensionEstimator(combine="pool"),
            "got n1=3; allowed are powers of two": lambda: GrideDimensionEstimator(n1=3),
            "range_max=2; with n1=2 allowed are ranks from 4 on": lambda: GrideDimensionEstimator(range_max=2),
            "got k1=20 and k2=20": lambda: CorrelationDimensionEstimator(k1=20),
            "got k=2": lambda: LocalPcaDimensionEstimator(k=2),
            "'maxgap'": lambda: LocalPcaDimensionEstimator(rule="maxgaps"),
            "got alpha=-1": lambda: LocalPcaDimensionEstimator(alpha=-1),
            "'strict'": lambda: MleDimensionEstimator(mode="stric"),
        }
        for message, make in wrong.items():
            with pytest.raises(ValueError, match=message):
                make()

    def test_the_registry_knows_them(self):
        assert [registry.get(name) for name in CLASSES] == list(CLASSES.values())
        assert all(registry.streaming(name).mode == "robust" for name in [*CLASSES, "twonn", "local_knn"])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_declared_invariances_hold_and_others_do_not(seed, power):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 4, dtype=torch.float64, generator=g) * torch.arange(1, 5)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    changed = {
        "permutation": x[:, torch.randperm(4, generator=g)],
        "orthogonal": x @ turn,
        "isotropic scaling": 10**power * x,
        "translation": x + 100 * torch.randn(4, generator=g, dtype=torch.float64),
    }
    for cls in CLASSES.values():
        assert cls.spec.invariant_to == set(changed)
        plain = float(scored(cls(), x)["score"])
        for name, other in changed.items():
            assert float(scored(cls(), other)["score"]) == pytest.approx(plain, rel=1e-8), (cls.spec.name, name)
        stretched = x @ torch.diag(torch.tensor([100.0, 1, 1, 1], dtype=torch.float64))
        assert abs(float(scored(cls(), stretched)["score"]) - plain) > 0.1
