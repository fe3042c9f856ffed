"""Procrustes, the CCA family, R^2 and GULP: plain references, closed forms, and invariances that hold or do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from tensordict import TensorDict

from tdprobe import registry
from tdprobe.errors import ConfigError
from tdprobe.estimator import score_all
from tdprobe.latent import (
    CcaEstimator,
    GulpEstimator,
    LinearRegressionEstimator,
    ProcrustesEstimator,
    PwccaEstimator,
    SvccaEstimator,
)
from tdprobe.stats import spectra
from tdprobe.stats.sketch import sketch_map
from tdprobe.stream.batch import Batch


def pair(n=80, d_a=6, d_b=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=g, dtype=torch.float64)
    scale = torch.tensor([3.0, 1.0, 0.3], dtype=torch.float64)
    rows = []
    for d in (d_a, d_b):
        noise = torch.randn(n, d, generator=g, dtype=torch.float64)
        rows.append((common * scale) @ torch.randn(3, d, generator=g, dtype=torch.float64) + noise + 2)
    return rows


def centred(x):
    x = x.double().numpy()
    return x - x.mean(0)


def frame(x):
    """Return an orthonormal basis of the columns, whatever their rank."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-10 * s[0]]


def correlations(x, y):
    return np.linalg.svd(frame(x).T @ frame(y), compute_uv=False)


def leading(x, share):
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    count = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), share)) + 1
    return u[:, :count] * s[:count]


def cca(x, y):
    return correlations(x, y).mean()


def squared_cca(x, y):
    return np.square(correlations(x, y)).mean()


def svcca(x, y, share):
    return correlations(leading(x, share), leading(y, share)).mean()


def pwcca(x, y):
    q_x, q_y = frame(x), frame(y)
    u, rho, _ = np.linalg.svd(q_x.T @ q_y, full_matrices=False)
    weights = np.abs((q_x @ u).T @ x).sum(1)
    return (weights * rho).sum() / weights.sum()


def whitened(x, alpha):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u * (alpha * s + (1 - alpha) * (s > 1e-10 * s[0]))) @ vt


def aligned(x, y, variant, alpha=1.0):
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(whitened(z, alpha), ((0, 0), (0, width - z.shape[1]))) for z in (x, y))
    if variant != "size-and-shape":
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    turn, _ = orthogonal_procrustes(y, x)
    return np.arccos(min(1.0, (x * (y @ turn)).sum())) if variant == "angular" else np.linalg.norm(x - y @ turn)


def r2(x, y, model):
    return r2_score(y, model.fit(x, y).predict(x), multioutput="variance_weighted")


def adjusted(x, y):
    n, p = x.shape
    return 1 - (1 - r2(x, y, LinearRegression())) * (n - 1) / (n - 1 - p)


def gulp(x, y, ridge):
    x, y = (np.sqrt(len(z)) * z / np.linalg.norm(z) for z in (x, y))
    n = len(x)
    inverse = [np.linalg.inv(z.T @ z / n + ridge * np.eye(z.shape[1])) for z in (x, y)]
    own = [np.trace(p @ (z.T @ z / n) @ p @ (z.T @ z / n)) for p, z in zip(inverse, (x, y), strict=True)]
    return np.sqrt(sum(own) - 2 * np.trace(inverse[0] @ (x.T @ y / n) @ inverse[1] @ (y.T @ x / n)))


CASES = {
    "cca": (CcaEstimator(), cca),
    "cca squared": (CcaEstimator(squared=True), squared_cca),
    "svcca": (SvccaEstimator(), lambda x, y: svcca(x, y, 0.99)),
    "svcca 0.8": (SvccaEstimator(variance=0.8, mode="robust"), lambda x, y: svcca(x, y, 0.8)),
    "pwcca": (PwccaEstimator(), pwcca),
    "procrustes": (ProcrustesEstimator(), lambda x, y: aligned(x, y, "angular")),
    "normalised": (ProcrustesEstimator(variant="normalised"), lambda x, y: aligned(x, y, "normalised")),
    "size-and-shape": (ProcrustesEstimator(variant="size-and-shape"), lambda x, y: aligned(x, y, "size-and-shape")),
    "shape 0": (ProcrustesEstimator(alpha=0), lambda x, y: aligned(x, y, "angular", 0)),
    "shape 0.5": (ProcrustesEstimator(alpha=0.5), lambda x, y: aligned(x, y, "angular", 0.5)),
    "shape 0.9": (
        ProcrustesEstimator(variant="size-and-shape", alpha=0.9),
        lambda x, y: aligned(x, y, "size-and-shape", 0.9),
    ),
    "robust shape": (
        ProcrustesEstimator(alpha=0.3, mode="robust"),
        lambda x, y: aligned(*(z * np.sqrt(frame(z).shape[1]) / np.linalg.norm(z) for z in (x, y)), "angular", 0.3),
    ),
    "robust size": (
        ProcrustesEstimator(variant="size-and-shape", mode="robust"),
        lambda x, y: aligned(x, y, "size-and-shape") / np.sqrt(len(x)),
    ),
    "linear_regression": (LinearRegressionEstimator(), lambda x, y: r2(x, y, LinearRegression())),
    "ridge": (LinearRegressionEstimator(ridge=0.1), lambda x, y: r2(x, y, Ridge(0.1 * np.sum(x**2)))),
    "adjusted": (LinearRegressionEstimator(mode="robust"), adjusted),
    "gulp": (GulpEstimator(), lambda x, y: gulp(x, y, 1e-2)),
    "gulp 1": (GulpEstimator(ridge=1), lambda x, y: gulp(x, y, 1)),
}
RANKS_LOST = {"adjusted"}


def value(estimator, a, b):
    return estimator(TensorDict({"data_a": a, "data_b": b}))[estimator.out_key]


def scored(estimator, *rows):
    batch = Batch({str(i): x for i, x in enumerate(rows)}, torch.arange(len(rows[0])))
    statistic = estimator._one_shot(batch)
    state = statistic.update(statistic.init(list(rows), batch.ids), list(rows), batch.ids)
    return estimator.score(state)["score"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(80, 6, 9), (300, 20, 3), (80, 1, 1)])
def test_values_equal_the_definition(name, shape):
    estimator, reference = CASES[name]
    a, b = pair(*shape)
    score = scored(estimator, a, b)
    x, y = centred(a), centred(b)
    assert score.dtype == torch.float64
    assert score[0, 1].item() == pytest.approx(reference(x, y), rel=1e-9)
    assert score[1, 0].item() == pytest.approx(reference(y, x), rel=1e-9)
    assert value(estimator, a, b).item() == pytest.approx(reference(x, y), rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(CASES) - RANKS_LOST))
@pytest.mark.parametrize("shape", [(7, 30, 4), (12, 40, 50)])
def test_fewer_rows_than_columns(name, shape):
    estimator, reference = CASES[name]
    a, b = pair(*shape)
    x, y = centred(a), centred(b)
    assert value(estimator, a, b).item() == pytest.approx(reference(x, y), rel=1e-6, abs=2e-7)
    whole = estimator.score(stream(estimator, [a, b], [len(a)]))["score"]
    np.testing.assert_allclose(scored(estimator, a, b), whole, rtol=1e-8, atol=1e-7)


def stream(estimator, rows, sizes):
    parts = zip(*(x.split(sizes) for x in rows), strict=True)
    batches = [Batch({str(i): x for i, x in enumerate(part)}, torch.arange(len(part[0]))) for part in parts]
    state = estimator.init(batches[0])
    for batch in batches:
        state = estimator.update(state, batch)
    return state


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 40), min_size=2, max_size=4), st.integers(0, 99))
def test_streamed_is_merged_is_one_shot(name, sizes, seed):
    estimator, _ = CASES[name]
    sizes = [30, *sizes]
    rows = [x + torch.arange(sum(sizes)).unsqueeze(1) / 50 for x in pair(sum(sizes), 4, 6, seed)]
    expected = scored(estimator, *rows)
    parts = [stream(estimator, [x[start : start + n] for x in rows], [n]) for start, n in starts(sizes)]
    merged = parts[2].merge(parts[0]).merge(parts[1])
    for part in parts[3:]:
        merged = part.merge(merged)
    for state in (stream(estimator, rows, sizes), merged):
        np.testing.assert_allclose(estimator.score(state)["score"], expected, rtol=1e-9, atol=1e-6)


def starts(sizes):
    return zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_float32_holds_at_an_offset(name, offset):
    estimator, reference = CASES[name]
    # The smallest deviation of a column is about 1.
    a, b = (x.float() + offset for x in pair(400, 20, 12, seed=2))
    assert value(estimator, a, b).item() == pytest.approx(reference(centred(a), centred(b)), rel=1e-4)


class TestInvariances:
    """What the rows of the specs list keeps the value, what they leave out does not."""

    @settings(max_examples=20, deadline=None)
    @given(st.sampled_from(["cca", "svcca", "pwcca", "procrustes", "linear_regression", "gulp"]), st.integers(0, 99))
    def test_declared_ones_hold_and_others_fail(self, name, seed):
        estimator = registry.get(name)()
        a, b = pair(200, seed=seed)
        g = torch.Generator().manual_seed(seed + 1)
        normal = torch.randn(6, 6, generator=g, dtype=torch.float64)
        transforms = {
            "permutation": a[:, torch.randperm(6, generator=g)],
            "orthogonal": a @ torch.linalg.qr(normal).Q,
            "isotropic scaling": -7.5 * a,
            "translation": a + 20 * normal[0],
            "invertible linear": a @ (normal * torch.tensor([1.0, 2, 4, 8, 16, 32])),
        }
        plain = scored(estimator, a, b)
        for transform, moved in transforms.items():
            found = scored(estimator, moved, b)
            kept = torch.allclose(found, plain, rtol=1e-8, atol=1e-6)
            assert kept == (transform in estimator.spec.invariant_to), transform
        assert torch.equal(plain, plain.mT) == estimator.spec.symmetric
        low, high = estimator.spec.bounds
        assert ((plain >= low) & (plain <= high)).all()

    @pytest.mark.parametrize("name", ["shape 0", "cca", "linear_regression"])
    def test_predictors_may_be_mapped_by_any_invertible_matrix(self, name):
        estimator, _ = CASES[name]
        a, b = pair(200)
        normal = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        moved, plain = (scored(estimator, x, b)[0, 1].item() for x in (a @ normal, a))
        assert moved == pytest.approx(plain, rel=1e-9)

    def test_scale_in_partial_whitening(self):
        a, b = pair(200)
        for mode, kept in (("strict", False), ("robust", True)):
            estimator = ProcrustesEstimator(alpha=0.5, mode=mode)
            twice = [torch.cat([x, x]) for x in (a, b)]
            for moved in ([100 * a, b], twice):
                same = torch.allclose(scored(estimator, *moved), scored(estimator, a, b), rtol=1e-8, atol=1e-6)
                assert same == kept


@pytest.mark.parametrize("name", ["procrustes", "normalised", "size-and-shape", "shape 0", "shape 0.5", "gulp"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), widths=st.lists(st.integers(1, 6), min_size=3, max_size=3), noise=st.floats(0.01, 3))
def test_metrics_obey_the_triangle_inequality(name, seed, widths, noise):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(15, 4, generator=g, dtype=torch.float64)
    rows = []
    for d in widths:
        mixed = base @ torch.randn(4, d, generator=g, dtype=torch.float64)
        rows.append(mixed + noise * torch.randn(15, d, generator=g, dtype=torch.float64))
    d = scored(CASES[name][0], *rows)
    assert (d.diagonal() < 1e-6 * (1 + d.max())).all()
    detours = d.unsqueeze(-1) + d.unsqueeze(0)
    assert (d.unsqueeze(1) <= detours + 1e-6 * (1 + d.max())).all()


class TestClosedForms:
    def test_what_a_layer_shares_with_its_images(self):
        a, _ = pair(200)
        g = torch.Generator().manual_seed(1)
        normal = torch.randn(6, 6, generator=g, dtype=torch.float64)
        turned, mapped = 3 - a @ torch.linalg.qr(normal).Q, a @ normal + 1
        for variant in ("angular", "normalised", "size-and-shape"):
            assert value(ProcrustesEstimator(variant=variant), a, turned) == pytest.approx(0, abs=1e-5)
        assert value(GulpEstimator(), a, 2 * turned) == pytest.approx(0, abs=1e-6)
        for estimator in (
            CcaEstimator(),
            SvccaEstimator(variance=1.0),
            PwccaEstimator(),
            LinearRegressionEstimator(),
            LinearRegressionEstimator(mode="robust"),
        ):
            assert value(estimator, a, mapped) == pytest.approx(1, abs=1e-6)

    def test_correlation_of_single_columns(self):
        # Correlation 1/2; every measure is a function of it.
        a = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)
        b = 5 * torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64)
        expected = {"cca": 0.5, "pwcca": 0.5, "svcca": 0.5, "procrustes": torch.pi / 3, "linear_regression": 0.25}
        for name, number in expected.items():
            assert value(registry.get(name)(), a, b) == pytest.approx(number, rel=1e-6)
        # (v / (v + r))^2 + ... - 2 c^2 / (v + r)^2 with v = 1, c = 1/2.
        assert value(GulpEstimator(ridge=1), a, b) == pytest.approx((0.25 + 0.25 - 0.125) ** 0.5, rel=1e-6)

    def test_independent_layers(self):
        # The squared canonical correlations of independent normal layers are Beta with mean d / (n - 1).
        x = torch.randn(2, 40, 200, 10, generator=torch.Generator().manual_seed(0))
        squares = value(CcaEstimator(squared=True), x[0], x[1])
        assert squares.mean().item() == pytest.approx(10 / 199, abs=5 * squares.std().item() / 40**0.5)
        plain, corrected = (value(LinearRegressionEstimator(mode=mode), x[0], x[1]) for mode in ("strict", "robust"))
        assert plain.mean().item() == pytest.approx(10 / 199, abs=5 * plain.std().item() / 40**0.5)
        assert abs(corrected.mean()) < 4 * corrected.std() / 40**0.5

    def test_few_rows_leave_nothing_to_correlate(self):
        a, b = pair(10, 30, 40)
        assert value(CcaEstimator(), a, b) == pytest.approx(1, abs=1e-6)
        assert value(LinearRegressionEstimator(), a, b) == pytest.approx(1, abs=1e-6)
        assert value(LinearRegressionEstimator(mode="robust"), a, b).isnan()


@pytest.mark.parametrize("name", CASES)
def test_rank_deficient_layers_count_the_axes_they_have(name):
    estimator, reference = CASES[name]
    a, b = pair(100, 4, 5)
    wide = torch.cat([a, a[:, :2] - a[:, 2:], torch.zeros(100, 2)], 1)
    found = scored(estimator, wide, b)
    if name not in RANKS_LOST:
        assert found[0, 1].item() == pytest.approx(reference(centred(wide), centred(b)), rel=1e-7)
    if name in ("cca", "pwcca", "linear_regression", "svcca"):
        single = scored(estimator, wide.float(), b.float())
        np.testing.assert_allclose(single, found, rtol=1e-4)


@pytest.mark.parametrize("name", ["cca", "pwcca", "linear_regression", "gulp", "shape 0"])
def test_massive_columns_cost_others_no_digits(name):
    # As in language models: one column of a thousand times the size must not drown small axes in its rounding.
    estimator, reference = CASES[name]
    a, b = pair(400, 10, 12)
    a[:, 3] *= 3000
    assert value(estimator, a.float(), b.float()).item() == pytest.approx(reference(centred(a), centred(b)), rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_layers_without_variance_or_with_nan_score_nan_and_no_other_does(name):
    estimator, _ = CASES[name]
    a, b = pair()
    broken = a.clone()
    broken[3, 1] = torch.nan
    rows = [a, torch.full((80, 3), 1e3, dtype=torch.float64), broken, b]
    batch = Batch({str(i): x for i, x in enumerate(rows)}, torch.arange(80))
    found = estimator.score(estimator.update(estimator.init(batch), batch))
    assert found["score"].isnan().tolist() == [[i in (1, 2) or j in (1, 2) for j in range(4)] for i in range(4)]
    assert found["finite"].tolist() == [True, True, False, True]
    torch.testing.assert_close(found["score"][[0, 3]][:, [0, 3]], scored(estimator, a, b), rtol=1e-9, atol=1e-6)
    with pytest.warns(UserWarning, match="data_b"):
        assert value(estimator, a, broken).isnan()
    with pytest.warns(UserWarning, match="data_b"):
        assert value(estimator, a[:4], torch.full((4, 9), torch.inf)).isnan()


@pytest.mark.parametrize("name", CASES)
def test_leading_dimensions_are_data_sets_of_their_own(name):
    estimator, _ = CASES[name]
    sets = [pair(30, 3, 4, seed) for seed in range(6)]
    sets[4][0][:] = 2.0
    a, b = (torch.stack(x).unflatten(0, (2, 3)) for x in zip(*sets, strict=True))
    expected = torch.stack([value(estimator, *rows) for rows in sets]).view(2, 3)
    assert expected.isnan().sum() == 1
    torch.testing.assert_close(value(estimator, a, b), expected, equal_nan=True)


def test_one_pass_serves_all_measures(monkeypatch):
    estimators = {name: estimator for name, (estimator, _) in CASES.items()}
    rows = [*pair(60), *pair(60, 9, 5, seed=1)]
    state = stream(CcaEstimator(), rows, [30, 30])
    alone = {name: estimator.score(state)["score"] for name, estimator in estimators.items()}
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(spectra.torch.linalg, "eigh", lambda x: calls.append(x) or eigh(x))
    found = score_all(estimators, {CcaEstimator().statistic(): state})
    assert len(calls) == len(rows)
    for name in estimators:
        torch.testing.assert_close(found[name]["score"], alone[name], rtol=1e-9, atol=1e-6)
    # Without whitening there is nothing to decompose.
    score_all({"procrustes": ProcrustesEstimator()}, {CcaEstimator().statistic(): state})
    assert len(calls) == len(rows)


def test_pairs_are_taken_in_parts_that_fit_into_memory(monkeypatch):
    rows = [*pair(60), *pair(60, 9, 5, seed=1), *pair(60, 6, 6, seed=2)]
    whole = {name: scored(estimator, *rows) for name, (estimator, _) in CASES.items()}
    monkeypatch.setattr(spectra, "BUDGET", 8 * 9 * 9)
    for name, (estimator, _) in CASES.items():
        torch.testing.assert_close(scored(estimator, *rows), whole[name])


@pytest.mark.parametrize("name", ["cca", "svcca", "pwcca", "procrustes", "linear_regression", "gulp"])
def test_a_sketch_is_the_measure_of_sketched_rows(name):
    _, reference = CASES[name]
    a, b = pair(100, 12, 5)
    sketched = a @ sketch_map(12, 6, 0, 0).double()
    found = scored(registry.get(name)(sketch=6), a, b)
    assert found[0, 1].item() == pytest.approx(reference(centred(sketched), centred(b)), rel=1e-9)
    assert found[1, 0].item() == pytest.approx(reference(centred(b), centred(sketched)), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CcaEstimator(ridge=-1), "ridge=-1"),
        (lambda: SvccaEstimator(variance=0), "variance=0"),
        (lambda: SvccaEstimator(variance=1.5), "variance=1.5"),
        (lambda: ProcrustesEstimator(alpha=-0.1), "alpha=-0.1"),
        (lambda: ProcrustesEstimator(variant="angles"), "did you mean 'angular'"),
        (lambda: GulpEstimator(ridge=float("nan")), "ridge=nan"),
        (lambda: PwccaEstimator(sketch=0), "sketch=0"),
        (lambda: LinearRegressionEstimator(mode="strikt"), "did you mean 'strict'"),
        (lambda: value(CcaEstimator(), torch.ones(1, 2), torch.ones(1, 2)), "got 1 rows; cca needs at least 2"),
        (lambda: value(CcaEstimator(), torch.ones(0, 2), torch.ones(0, 2)), "got 0 rows"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("sketch", [True, 2.5, "64", 0])
def test_a_sketch_is_a_number_of_columns(sketch):
    with pytest.raises(ConfigError, match="got sketch=.*numbers of columns"):
        CcaEstimator(sketch=sketch)


@pytest.mark.parametrize("ridge", [True, "0.1", -1, float("nan"), None])
@pytest.mark.parametrize(
    "cls", [CcaEstimator, GulpEstimator, LinearRegressionEstimator, PwccaEstimator, SvccaEstimator]
)
def test_a_ridge_is_a_number(cls, ridge):
    with pytest.raises(ConfigError, match="got ridge=.*numbers from 0 on"):
        cls(ridge=ridge)


@pytest.mark.parametrize("cls", [CcaEstimator, PwccaEstimator])
def test_robust_says_nothing_where_the_number_of_rows_decides(cls):
    x, y = pair(30, 40, 5)
    td = TensorDict({"data_a": x, "data_b": y})
    key = cls().out_keys[0]
    assert cls()(td.clone())[key] == 1
    assert cls(mode="robust")(td.clone())[key].isnan()
    # A ridge leaves something to be measured, and so does one row more than the columns and the mean take.
    assert cls(mode="robust", ridge=0.1)(td.clone())[key] < 1
    for n, known in ((7, False), (6, True)):
        a, b = pair(8, n, 3)
        found = cls(mode="robust")(TensorDict({"data_a": a, "data_b": b}))[key]
        assert found.isnan() != known and (not known or found < 1)


def test_the_fallback_of_the_decomposition_is_one(monkeypatch):
    from tdprobe.stats.spectra import svd

    g = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)

    def refuse(*args, **kwargs):
        raise torch.linalg.LinAlgError("many equal values")

    expected = torch.linalg.svdvals(matrices)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    for matrix in (matrices, matrices.mT):
        u, values, v = svd(matrix)
        torch.testing.assert_close(values, expected, rtol=1e-7, atol=0)
        torch.testing.assert_close(u * values.unsqueeze(-2) @ v, matrix, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(u.mT @ u, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), rtol=0, atol=1e-7)
