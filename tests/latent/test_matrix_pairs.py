"""Joint entropy, mutual information and DiME of layer pairs: closed forms, the definitions, what must change them."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from neighbor_tools import scored
from spectral_tools import changes, entropy, gram, rows, streamed, unit_diagonal
from tdprobe import registry
from tdprobe.latent import DimeEstimator, MatrixJointEntropyEstimator, MatrixMutualInformationEstimator
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.scorer import Scorer
from tdprobe.stats import JointEntropy, Reservoir
from tdprobe.stream.batch import Batch

FAMILY = [MatrixJointEntropyEstimator, MatrixMutualInformationEstimator, DimeEstimator]
LINEAR = {"kernel": "linear"}
ORDERS = [0.6, 1, 1.01, 2, 4, math.inf]


def value(estimator, a, b):
    td = TensorDict({"data_a": a, "data_b": b}, batch_size=a.shape[:-2])
    return estimator(td)[estimator.out_key]


def exact(estimator, a, b):
    return scored(estimator, a, b)["score"][0, 1].item()


def definition(a, b, alpha, **options):
    """Return S(A), S(B) and S(A, B)."""
    p, q = (unit_diagonal(gram(x, **{"kernel": "rbf", **options})) for x in (a, b))
    return [entropy(k, alpha) for k in (p, q, p * q)]


def related(n=40, seed=0):
    a = rows(n, 5, seed)
    return a, a[:, :2] @ rows(2, 7, seed + 1) + rows(n, 7, seed + 2)


class TestClosedForms:
    # Groups 00, 01, 10, 11 of three samples each: independent bits, or the same one twice.
    bits = torch.tensor([[a, b] for a, b in product((0, 1), repeat=2) for _ in range(3)])

    def one_hot(self, column):
        return torch.eye(2)[self.bits[:, column]] * torch.arange(1.0, 13).unsqueeze(1)

    @pytest.mark.parametrize("alpha", ORDERS)
    def test_bits(self, alpha):
        a, b = self.one_hot(0), self.one_hot(1)
        joint, mutual, dime = (cls(alpha=alpha, **LINEAR) for cls in FAMILY)
        assert value(joint, a, b).item() == pytest.approx(math.log(4), abs=1e-6)
        assert value(joint, a, -a).item() == pytest.approx(math.log(2), abs=1e-6)
        assert value(mutual, a, b).item() == pytest.approx(0, abs=1e-6)
        assert value(mutual, a, -a).item() == pytest.approx(math.log(2), abs=1e-6)
        assert value(dime, a, -a).item() > 0.3

    @pytest.mark.parametrize("alpha", ORDERS)
    @pytest.mark.parametrize("cls", FAMILY)
    def test_a_layer_without_information(self, cls, alpha):
        a, same = rows(12, 4), torch.ones(12, 3)
        own = definition(a, a, alpha)[0]
        expected = {"matrix_joint_entropy": own, "matrix_mutual_information": 0, "dime": 0}[cls.spec.name]
        assert value(cls(alpha=alpha), a, same).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


class TestDefinition:
    @pytest.mark.parametrize("options", [{}, LINEAR], ids=["rbf", "linear"])
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("normalize_rows", [False, True])
    @pytest.mark.parametrize("alpha", ORDERS)
    def test_joint_and_mutual(self, alpha, options, center, normalize_rows):
        a, b = related(30)
        options = {**options, "center": center, "normalize_rows": normalize_rows}
        one, other, joint = definition(a, b, alpha, **options)
        found = exact(MatrixJointEntropyEstimator(alpha=alpha, **options), a, b)
        assert found == pytest.approx(joint, rel=1e-9)
        found = exact(MatrixMutualInformationEstimator(alpha=alpha, **options), a, b)
        assert found == pytest.approx(one + other - joint, rel=1e-8, abs=1e-9)

    @pytest.mark.parametrize("n", [2, 15, 129, 300])
    def test_tiles_of_all_sizes(self, n):
        a, b = related(n)
        for options in ({}, LINEAR):
            found = exact(MatrixJointEntropyEstimator(**options), a, b)
            p, q = (unit_diagonal(gram(x, **{"kernel": "rbf", **options})) for x in (a, b))
            assert found == pytest.approx(-math.log(((p * q) ** 2).sum() / n**2), rel=1e-9)

    @pytest.mark.parametrize("alpha", [1, 2])
    def test_dime_is_the_mean_over_all_orders(self, alpha):
        a, b = related(5)
        p, q = (unit_diagonal(gram(x, "rbf")) for x in (a, b))
        orders = [np.ix_(order, order) for order in map(list, permutations(range(5)))]
        shuffled = [entropy(p * q[order], alpha) for order in orders]
        drawn = 2000 if alpha == 2 else 400
        found = exact(DimeEstimator(alpha=alpha, permutations=drawn), a, b)
        # Four standard errors of the orders forth alone; they count back too.
        assert found == pytest.approx(np.mean(shuffled) - entropy(p * q, alpha), abs=4 * np.std(shuffled) / drawn**0.5)

    def test_by_default_dime_of_order_two_is_the_logarithm_of_the_mean(self):
        a, b = related(5)
        for options in ({}, {**LINEAR, "center": True}):
            p, q = (unit_diagonal(gram(x, **{"kernel": "rbf", **options})) for x in (a, b))
            orders = [np.ix_(order, order) for order in map(list, permutations(range(5)))]
            purity = np.mean([((p * q[order]) ** 2).sum() / 25 for order in orders])
            found = exact(DimeEstimator(**options), a, b)
            assert found == pytest.approx(-np.log(purity) - entropy(p * q, 2), rel=1e-9)
        x, y = related(100)
        assert exact(DimeEstimator(), x, y) == pytest.approx(exact(DimeEstimator(permutations=100), x, y), abs=2e-3)

    def test_orders_next_to_two_agree_with_it(self):
        a, b = related(60)
        for cls in FAMILY:
            options = {"permutations": 3} if cls is DimeEstimator else {}
            by_tiles, by_eigenvalues = (exact(cls(alpha=alpha, **options), a, b) for alpha in (2, 2 + 1e-9))
            assert by_tiles == pytest.approx(by_eigenvalues, abs=1e-7)

    def test_dime_is_zero_for_independent_layers_where_mutual_information_is_not(self):
        g = torch.Generator().manual_seed(0)
        pairs = [torch.randn(2, 60, 20, generator=g, dtype=torch.float64) for _ in range(20)]
        dime = np.array([exact(DimeEstimator(), *pair) for pair in pairs])
        mutual = np.array([exact(MatrixMutualInformationEstimator(), *pair) for pair in pairs])
        assert abs(dime.mean()) < 4 * dime.std() / 20**0.5
        assert mutual.min() > 2 * abs(dime).max()

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from([0.5, 1, 2, 3, math.inf]), st.sampled_from(["rbf", "linear"]))
    def test_joint_entropy_is_at_least_either_and_at_most_log_n(self, seed, alpha, kernel):
        a, b = related(20, seed)
        one, other, _ = definition(a, b, alpha, kernel=kernel)
        joint = exact(MatrixJointEntropyEstimator(alpha=alpha, kernel=kernel), a, b)
        assert max(one, other) - 1e-9 <= joint <= math.log(20) + 1e-9
        mutual = exact(MatrixMutualInformationEstimator(alpha=alpha, kernel=kernel), a, b)
        assert mutual <= min(one, other) + 1e-9
        if alpha == 1:
            assert mutual >= -1e-9

    def test_float32_holds_at_an_offset(self):
        a, b = (x + 1000 for x in related(80))
        for cls in FAMILY:
            assert value(cls(), a.float(), b.float()).item() == pytest.approx(exact(cls(), a, b), rel=1e-4)


class TestStreams:
    @pytest.mark.parametrize("cls", FAMILY)
    @pytest.mark.parametrize("alpha", [1, 2])
    def test_batches_and_merges_do_not_matter(self, cls, alpha):
        layers, estimator = list(related(50)), cls(alpha=alpha, bank_size=30)
        whole = streamed(estimator, layers, [50])["score"]
        assert torch.equal(whole, streamed(estimator, layers, [7, 3, 40])["score"])
        assert torch.equal(whole, streamed(estimator, layers, [20, 30], merge=True)["score"])
        kept = Reservoir(30)
        kept = kept.update(kept.init(layers, torch.arange(50)), layers, torch.arange(50)).ids
        if cls is not DimeEstimator or alpha == 2:
            # Its shuffles start from the order of the rows.
            assert whole[0, 1].item() == pytest.approx(exact(estimator, *(x[kept] for x in layers)), rel=1e-9)

    def test_estimators_share_their_entropies(self, monkeypatch):
        made, run = [], JointEntropy.__call__
        monkeypatch.setattr(JointEntropy, "__call__", lambda self, state: made.append(self) or run(self, state))
        names = ["matrix_joint_entropy", "dime", "matrix_mutual_information"]
        shuffled = [DimeEstimator(permutations=p, seed=s) for p, s in ((4, 0), (9, 0), (4, 1))]
        scorer = Scorer(resolve_estimators([*names, *shuffled]), max_norm=None)
        a, b = related(50)
        scorer.push(Batch({"a": a, "b": b, "wide": torch.cat([a, b], 1)}, torch.arange(50)))
        found = scorer.scores()
        assert made == [JointEntropy(permutations=9), JointEntropy(permutations=4, seed=1)]
        bank = next(iter(scorer.states().values()))
        for label, estimator in scorer.estimators.items():
            torch.testing.assert_close(found[label], estimator.score(bank)["score"], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(found[label], found[label].mT)
        assert JointEntropy().joined(JointEntropy(alpha=1.0)) is None and JointEntropy().joined(Reservoir()) is None

    def test_leading_dimensions_are_data_sets(self):
        pairs = [related(20, seed) for seed in range(6)]
        a, b = (torch.stack(x).unflatten(0, (2, 3)) for x in zip(*pairs, strict=True))
        for cls in FAMILY:
            found = value(cls(), a, b)
            assert found.shape == (2, 3) and found[1, 2].item() == pytest.approx(exact(cls(), *pairs[5]), rel=1e-6)
            assert value(cls(), a[:0], b[:0]).shape == (0, 3)


class TestDegenerate:
    @pytest.mark.parametrize("alpha", [1, 2])
    @pytest.mark.parametrize("bad", ["nan", "inf", "constant"])
    @pytest.mark.parametrize("cls", FAMILY)
    def test_a_bad_layer_leaves_the_others_alone(self, cls, bad, alpha):
        a, b = related(20)
        broken = a.clone()
        broken[3, 1] = math.nan if bad == "nan" else math.inf
        broken = torch.full_like(a, 2.5) if bad == "constant" else broken
        found = scored(cls(alpha=alpha, center=True), a, broken, b)
        assert found["score"].isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]
        assert found["finite"].tolist() == [True, bad == "constant", True]
        assert found["score"][0, 2].item() == pytest.approx(exact(cls(alpha=alpha, center=True), a, b), rel=1e-9)

    def test_nan_names_the_key(self):
        a, b = related(20)
        a[0, 0] = math.nan
        with pytest.warns(UserWarning, match="'data_a' held NaN"):
            assert value(DimeEstimator(), a, b).isnan()

    @pytest.mark.parametrize("alpha", [1, 2])
    def test_rows_of_zeros_count_as_absent(self, alpha):
        a, b = related(20)
        estimator = MatrixMutualInformationEstimator(alpha=alpha, kernel="linear")
        more = [torch.cat([x, torch.zeros(5, x.shape[1])]) for x in (a, b)]
        assert exact(estimator, *more) == pytest.approx(exact(estimator, a, b), rel=1e-9)
        assert value(estimator, a, torch.zeros(20, 3)).isnan() and value(estimator, a, torch.zeros(20, 0)).isnan()

    def test_duplicates_change_no_entropy(self):
        a, b = related(20)
        for cls in FAMILY[:2]:
            found = exact(cls(), a.repeat(3, 1), b.repeat(3, 1))
            assert found == pytest.approx(exact(cls(), a, b), rel=1e-9)

    def test_too_few_rows_and_bad_arguments(self):
        for cls in FAMILY:
            with pytest.raises(ValueError, match=rf"got 1 rows; {cls.spec.name} needs at least 2"):
                value(cls(), torch.ones(1, 2), torch.ones(1, 2))
        with pytest.raises(ValueError, match="permutations=0"):
            DimeEstimator(permutations=0)
        with pytest.raises(ValueError, match="alpha=0"):
            MatrixMutualInformationEstimator(alpha=0)
        with pytest.raises(ValueError, match="size=0"):
            MatrixJointEntropyEstimator(bank_size=0)
        shown = repr(DimeEstimator(alpha=1.0))
        assert "alpha=1.0, kernel='rbf', bandwidth=1.0, center=False" in shown and "permutations=None, seed=0" in shown

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
    def test_other_dtypes_count_in_full(self, dtype):
        a, b = ((10 * x).to(dtype) for x in related(30))
        for cls in FAMILY:
            found = value(cls(), a, b)
            assert found.dtype == torch.float32
            assert found.item() == pytest.approx(exact(cls(), a.double(), b.double()), rel=1e-5)


class TestInvariance:
    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from(FAMILY), st.sampled_from([1, 2]))
    def test_declared_ones_hold_and_others_do_not(self, seed, cls, alpha):
        a, b = related(30)
        plain = exact(cls(alpha=alpha), a, b)
        for name, changed in changes(a, seed).items():
            same = exact(cls(alpha=alpha), changed, b) == pytest.approx(plain, rel=1e-7)
            assert same == (name in cls.spec.invariant_to), name
        assert exact(cls(alpha=alpha), b, a) == pytest.approx(plain, rel=1e-9) and cls.spec.symmetric
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        if cls is not DimeEstimator or alpha == 2:
            # Its shuffles start from the order of the rows.
            assert exact(cls(alpha=alpha), a[order], b[order]) == pytest.approx(plain, rel=1e-9)
        assert cls.spec.bounds[0] <= plain <= cls.spec.bounds[1]

    def test_linear_kernels_see_the_origin(self):
        a, b = related(30)
        for cls in FAMILY:
            plain = exact(cls(**LINEAR), a, b)
            assert exact(cls(**LINEAR), a + 5, b) != pytest.approx(plain, rel=1e-3)
            assert exact(cls(**LINEAR, center=True), a + 5, b) == pytest.approx(
                exact(cls(**LINEAR, center=True), a, b), rel=1e-9
            )

    def test_the_registry_names_them(self):
        assert [registry.get(cls.spec.name) for cls in FAMILY] == FAMILY
