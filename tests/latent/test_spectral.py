"""Measures of the spectrum of a layer: closed forms, the definitions in numpy, what must and must not change them."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from neighbor_tools import scored
from spectral_tools import changes, entropy, gram, prepared, renyi, rows, streamed
from tdprobe import registry
from tdprobe.estimator import score_all
from tdprobe.latent import (
    EffectiveRankEstimator,
    LayerScoring,
    MatrixEntropyEstimator,
    ParticipationRatioEstimator,
    RankMeEstimator,
)
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.scorer import Scorer
from tdprobe.stats import Moments, Reservoir, Spectrum, renyi_entropy
from tdprobe.stream.batch import Batch

FAMILY = [ParticipationRatioEstimator, EffectiveRankEstimator, RankMeEstimator, MatrixEntropyEstimator]
FLAGS = [{"center": c, "normalize_rows": r} for c, r in product((False, True), repeat=2)]
RBF = {"kernel": "rbf", "bandwidth": 0.8}


def value(estimator, x):
    return estimator(TensorDict({"data": x}, batch_size=x.shape[:-2]))[estimator.out_key]


def exact(estimator, x):
    return float(scored(estimator, x)["score"])


def by_definition(cls, x, **flags):
    s = np.linalg.svd(prepared(x, **flags), compute_uv=False)
    if cls is ParticipationRatioEstimator:
        return (s**2).sum() ** 2 / (s**4).sum()
    if cls is MatrixEntropyEstimator:
        return renyi(s**2, 1)
    return np.exp(renyi(s if cls is RankMeEstimator else s**2, 1))


class TestClosedForms:
    @pytest.mark.parametrize("cls", FAMILY[:3])
    @pytest.mark.parametrize("d", [1, 2, 7, 140])
    def test_equal_variances_fill_all_directions(self, cls, d):
        x = 3 * torch.cat([torch.eye(d), -torch.eye(d)])
        assert value(cls(), x).item() == pytest.approx(d, rel=1e-6)

    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("cls", FAMILY[:3])
    def test_one_direction(self, cls, flags):
        x = torch.outer(torch.tensor([1.0, -2.0, 4.0, 0.5, -1.5]), torch.tensor([0.3, 1.0, -2.0]))
        assert value(cls(**flags), x).item() == pytest.approx(1, rel=1e-6)

    @pytest.mark.parametrize("alpha", [0.3, 1.0, 1.5, 2.0, 7.0, math.inf])
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_equal_groups_that_have_nothing_in_common(self, k, alpha):
        x = torch.eye(9)[:k].repeat_interleave(6, 0) * torch.arange(1.0, 7).repeat(k).unsqueeze(1)
        assert value(MatrixEntropyEstimator(alpha=alpha), x).item() == pytest.approx(math.log(k), abs=1e-6)
        far = torch.eye(9)[:k].repeat_interleave(6, 0) * 100.0
        if k > 1:
            # At a twentieth of their distance rbf sees the others no more.
            narrow = MatrixEntropyEstimator(alpha=alpha, kernel="rbf", bandwidth=0.05)
            assert value(narrow, far).item() == pytest.approx(math.log(k), abs=1e-6)

    def test_singular_values_and_eigenvalues(self):
        # Singular values 3 and 1: p is 3/4 and 1/4 of RankMe, 9/10 and 1/10 of the covariance.
        x = torch.diag(torch.tensor([3.0, 1.0]))
        p, q = np.array([0.75, 0.25]), np.array([0.9, 0.1])
        assert value(RankMeEstimator(), x).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        rank = value(EffectiveRankEstimator(center=False), x).item()
        assert rank == pytest.approx(np.exp(-(q * np.log(q)).sum()), rel=1e-6)
        assert value(ParticipationRatioEstimator(center=False), x).item() == pytest.approx(100 / 82, rel=1e-6)
        entropy = MatrixEntropyEstimator(alpha=math.inf, normalize_rows=False)
        assert value(entropy, x).item() == pytest.approx(-math.log(0.9), rel=1e-6)

    def test_they_are_ordered(self):
        x = rows(50, 12)
        ratio, rank = (exact(cls(), x) for cls in FAMILY[:2])
        assert 1 < ratio < rank < exact(RankMeEstimator(center=True), x) < 12
        assert ratio == pytest.approx(
            math.exp(exact(MatrixEntropyEstimator(alpha=2, center=True, normalize_rows=False), x)), rel=1e-12
        )

    def test_a_random_sample_has_the_participation_ratio_of_its_size(self):
        # Wishart: n d / (n + d + 1) for independent normal columns, up to 1 / (n d).
        x = torch.randn(400, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert exact(ParticipationRatioEstimator(center=False), x) == pytest.approx(400 * 100 / 501, rel=0.01)


class TestOrders:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)

    @pytest.mark.parametrize("alpha", [1e-3, 0.49, 0.5, 0.51, 0.9, 1.1, 1.49, 1.5, 1.51, 2, 20, 300])
    def test_the_formula(self, alpha):
        assert float(renyi_entropy(self.shares, alpha)) == pytest.approx(renyi(self.shares.numpy(), alpha), rel=1e-12)

    @pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
    def test_continuous_at_one(self, step):
        at = float(renyi_entropy(self.shares, 1.0))
        p = self.shares[:4]
        # Its slope at 1 is minus half the variance of log p.
        slope = -0.5 * float((p * p.log().square()).sum() - (p * p.log()).sum() ** 2)
        for sign in (-1, 1):
            alpha = 1 + sign * step
            expected = at + slope * (alpha - 1)
            assert float(renyi_entropy(self.shares, alpha)) == pytest.approx(expected, abs=step**2 + 1e-14)

    def test_limits(self):
        assert float(renyi_entropy(self.shares, math.inf)) == pytest.approx(math.log(2))
        assert float(renyi_entropy(self.shares, 1e6)) == pytest.approx(math.log(2), rel=1e-5)
        assert float(renyi_entropy(self.shares, 1e-9)) == pytest.approx(math.log(4), rel=1e-8)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=9), st.floats(0.01, 50), st.floats(0.01, 50))
    def test_falls_with_the_order_between_the_bounds(self, weights, one, other):
        p = torch.tensor(weights, dtype=torch.float64)
        p /= p.sum()
        low, high = (float(renyi_entropy(p, alpha)) for alpha in sorted((one, other), reverse=True))
        assert -1e-12 <= float(renyi_entropy(p, math.inf)) - 1e-12 <= low <= high + 1e-12 <= math.log(len(p)) + 2e-12

    @pytest.mark.parametrize("alpha", [0, -1.0, math.nan])
    def test_orders_that_do_not_exist(self, alpha):
        with pytest.raises(ValueError, match=r"got alpha=.*above 0"):
            MatrixEntropyEstimator(alpha=alpha)


class TestDefinition:
    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("shape", [(2, 1), (9, 30), (60, 8), (300, 150)])
    @pytest.mark.parametrize("cls", FAMILY)
    def test_linear(self, cls, shape, flags):
        if shape == (2, 1) and cls is MatrixEntropyEstimator:
            shape = (3, 2)
        x = rows(*shape)
        assert exact(cls(**flags), x) == pytest.approx(by_definition(cls, x, **flags), rel=1e-9)

    @pytest.mark.parametrize("options", [{}, RBF], ids=["linear", "rbf"])
    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("alpha", [0.7, 1, 1.01, 2, 3, math.inf])
    def test_entropy_of_the_kernel_matrix(self, alpha, flags, options):
        x = rows(40, 5)
        found = exact(MatrixEntropyEstimator(alpha=alpha, **options, **flags), x)
        assert found == pytest.approx(entropy(gram(x, **options, **flags), alpha), rel=1e-9)

    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("cls", FAMILY)
    def test_fewer_rows_than_columns_go_by_the_gram_matrix_to_the_same_value(self, cls, flags):
        x, estimator = rows(20, 33), cls(**flags)
        batch = Batch({"x": x}, torch.arange(20))
        assert isinstance(estimator._one_shot(batch), Reservoir) and estimator.statistic() == Moments(
            flags["normalize_rows"]
        )
        whole = estimator.score(estimator.update(estimator.init(batch), batch))["score"]
        assert exact(estimator, x) == pytest.approx(float(whole), rel=1e-9)

    @pytest.mark.parametrize("cls", FAMILY)
    @pytest.mark.parametrize("offset", [0.0, 1000.0])
    def test_float32_holds_for_few_directions_at_an_offset(self, cls, offset):
        x = (rows(500, 64, rank=5) + offset).float()
        flags = {"center": True}
        expected = by_definition(cls, x, **flags, normalize_rows=cls is MatrixEntropyEstimator)
        for found in (value(cls(**flags), x), streamed(cls(**flags), [x], [100] * 5)["score"]):
            assert found.item() == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("cls", FAMILY)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
    def test_other_dtypes_count_in_full(self, cls, dtype):
        x = (10 * rows()).to(dtype)
        found = value(cls(), x)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exact(cls(), x.double()), rel=1e-6)

    def test_scales_that_leave_float32_when_squared(self):
        for cls, scale in product(FAMILY, (1e-30, 1e30)):
            assert value(cls(), (rows() * scale).float()).item() == pytest.approx(exact(cls(), rows()), rel=1e-5)


class TestStreams:
    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 2),
        st.sampled_from(FAMILY),
        st.sampled_from(FLAGS),
        st.integers(0, 99),
    )
    def test_any_batches_and_any_merge_give_the_definition(self, sizes, cls, flags, seed):
        layers = [rows(sum(sizes), d, seed) for d in (2, 5)]
        expected = [by_definition(cls, x, **flags) for x in layers]
        for merge in (False, True):
            found = streamed(cls(**flags), layers, sizes, merge)["score"]
            assert found.tolist() == pytest.approx(expected, rel=1e-8)

    def test_a_bank_for_the_rbf_kernel(self):
        x, estimator = rows(90, 6), MatrixEntropyEstimator(**RBF, bank_size=40)
        parts = streamed(estimator, [x], [7, 33, 50])["score"]
        assert torch.equal(parts, streamed(estimator, [x], [90])["score"])
        assert torch.equal(parts, streamed(estimator, [x], [40, 50], merge=True)["score"])
        bank = Reservoir(40)
        kept = bank.update(bank.init([x], torch.arange(90)), [x], torch.arange(90)).ids
        flags = {"center": False, "normalize_rows": True}
        assert float(parts) == pytest.approx(entropy(gram(x[kept], **RBF, **flags)), rel=1e-9)

    def test_one_eigendecomposition_per_layer_and_matrix(self, monkeypatch):
        calls, solve = [], torch.linalg.eigvalsh
        monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: calls.append(x.shape) or solve(x))
        orders = [MatrixEntropyEstimator(alpha=a, normalize_rows=False) for a in (0.5, 1, 2, math.inf)]
        names = ["participation_ratio", "rankme", *orders]
        scorer = Scorer(resolve_estimators(names), portion=16, max_norm=None, groups=0)
        layers = {"a": rows(50, 4), "b": rows(50, 9), "c": rows(50, 9, 1)}
        scorer.push(Batch(layers, torch.arange(50)))
        assert {source.statistic for source in scorer._sources.values()} == {Moments()}
        found = scorer.scores()
        # RankMe and all entropies look at X'X; the participation ratio and order 2 need no eigenvalues.
        assert calls == [(4, 4), (9, 9), (9, 9)]
        for label, estimator in scorer.estimators.items():
            torch.testing.assert_close(found[label], scored(estimator, *layers.values())["score"], rtol=1e-9, atol=0)

    def test_what_is_joined(self):
        one, other = Spectrum(values=False), Spectrum()
        assert one.joined(other) == other.joined(one) == other
        assert one.joined(Spectrum(center=True)) is None and one.joined("spectrum") is None
        states = {}
        assert score_all({}, states) == {}

    def test_a_state_keeps_its_value_and_leading_dimensions_are_data_sets(self):
        x = torch.stack([rows(30, 4, seed) for seed in range(6)]).unflatten(0, (2, 3))
        for cls in FAMILY:
            found = value(cls(), x)
            assert found.shape == (2, 3)
            assert found[1, 2].item() == pytest.approx(exact(cls(), x[1, 2]), rel=1e-6)
            assert value(cls(), x[:0]).shape == (0, 3)
            assert value(cls(), x[..., :3, :])[1, 0].item() == pytest.approx(exact(cls(), x[1, 0, :3]), rel=1e-6)


class TestDegenerate:
    @pytest.mark.parametrize("cls", FAMILY)
    def test_layers_that_do_not_vary(self, cls):
        constant = torch.full((20, 3), 3.1)
        assert value(cls(center=True), constant).isnan()
        assert value(cls(center=False), constant).item() == pytest.approx(0 if cls is MatrixEntropyEstimator else 1)
        for flags in FLAGS:
            assert value(cls(**flags), torch.zeros(20, 3)).isnan()
            assert value(cls(**flags), torch.zeros(20, 0)).isnan()
        assert value(MatrixEntropyEstimator(kernel="rbf"), constant).item() == pytest.approx(0, abs=1e-6)
        assert value(MatrixEntropyEstimator(kernel="rbf", center=True), constant).isnan()

    @pytest.mark.parametrize("cls", FAMILY)
    @pytest.mark.parametrize("wide", [False, True])
    def test_duplicates_change_nothing(self, cls, wide):
        x = rows(6 if wide else 30, 8)
        assert exact(cls(), x.repeat(3, 1)) == pytest.approx(exact(cls(), x), rel=1e-9)

    def test_the_median_distance_is_that_of_rows_that_differ(self):
        x = torch.cat([rows(3, 4).repeat(20, 1), rows(10, 4, 1)])
        found = exact(MatrixEntropyEstimator(kernel="rbf", normalize_rows=False), x)
        assert found == pytest.approx(entropy(gram(x, "rbf")), rel=1e-9)

    @pytest.mark.parametrize("cls", FAMILY)
    def test_too_few_rows(self, cls):
        assert value(cls(center=False), rows(1, 4)).item() == pytest.approx(0 if cls is MatrixEntropyEstimator else 1)
        with pytest.raises(ValueError, match=rf"got 1 rows; {cls.spec.name} with center=True needs at least 2"):
            value(cls(center=True), rows(1, 4))
        with pytest.raises(ValueError, match="got 0 rows.*needs at least 1 row"):
            value(cls(center=False), torch.zeros(0, 4))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("n", [4, 30])
    @pytest.mark.parametrize("estimator", [*(cls() for cls in FAMILY), MatrixEntropyEstimator(**RBF)], ids=repr)
    def test_nan_in_nan_out_with_one_warning_that_names_the_key(self, estimator, n, bad):
        x = torch.stack([rows(n, 8), rows(n, 8, 1)])
        x[1, 2, 3] = bad
        with pytest.warns(UserWarning, match="'data' held NaN or infinite values") as caught:
            found = value(estimator, x)
        assert len(caught) == 1 and found.isnan().tolist() == [False, True]
        assert found[0].item() == pytest.approx(value(estimator, x[0]).item(), rel=1e-6)

    def test_arguments(self):
        with pytest.raises(ValueError, match="unknown kernel 'rfb'; did you mean 'rbf'"):
            MatrixEntropyEstimator(kernel="rfb")
        with pytest.raises(ValueError, match=r"bandwidth=0.*median"):
            MatrixEntropyEstimator(kernel="rbf", bandwidth=0)
        with pytest.raises(ValueError, match="got center='yes'; allowed are True and False"):
            RankMeEstimator(center="yes")
        with pytest.raises(TypeError):
            RankMeEstimator("data", "rank", True)
        assert repr(EffectiveRankEstimator(center=False)).endswith("center=False, normalize_rows=False, mode='strict')")


class TestInvariance:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from([*FAMILY, "rbf"]))
    def test_declared_ones_hold_and_others_do_not(self, seed, cls):
        options = RBF | {"normalize_rows": False} if cls == "rbf" else {}
        cls = MatrixEntropyEstimator if cls == "rbf" else cls
        x, kept = rows(40, 6), set(cls.spec.invariant_to)
        # The kernel sees distances only.
        kept |= {"translation"} if options else set()
        plain = exact(cls(**options), x)
        for name, changed in changes(x, seed).items():
            same = exact(cls(**options), changed) == pytest.approx(plain, rel=1e-7)
            assert same == (name in kept), name
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        assert exact(cls(**options), x[order]) == pytest.approx(plain, rel=1e-9)
        low, high = cls.spec.bounds
        assert low <= plain <= high

    def test_the_registry_names_them(self):
        found = [registry.get(name) for name in ("participation_ratio", "effective_rank", "rankme", "matrix_entropy")]
        assert found == FAMILY


def test_a_language_model_in_one_pass(smollm2):
    from tdprobe import hf

    model, tokenizer = smollm2
    texts = [text for text in hf.read_texts("demo") if len(text) < 120][:40]
    names = ["participation_ratio", "effective_rank", "rankme", "matrix_entropy"]
    with torch.no_grad(), LayerScoring(r"model\.layers\.(0|14|29)$", names).prepare(model) as hooked:
        for batch in hf.batches(texts, tokenizer, batch_size=20, max_length=48):
            hooked(**batch.inputs)
    table = hooked.hooking_context.scores()
    found = {name: table.matrix(name) for name in names}
    n = hooked.hooking_context.n_rows
    ceiling = min(n, 576)
    assert all(np.isfinite(x).all() and (x > 0).all() for x in found.values())
    assert (found["participation_ratio"] < found["effective_rank"]).all()
    assert (found["rankme"] < ceiling).all() and (found["matrix_entropy"] < math.log(ceiling)).all()
