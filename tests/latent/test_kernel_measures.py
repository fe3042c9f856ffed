"""Measures over all pairs of samples: plain references, closed forms, what must and must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

import kernel_tools as plain
from neighbor_tools import scored
from tdprobe.errors import ConfigError
from tdprobe.latent import CkaEstimator, CknnaEstimator, DistanceCorrelationEstimator, RsaEstimator
from tdprobe.stats import Reservoir
from tdprobe.stream.batch import Batch

# Each measure with the same in plain numpy.
CASES = {
    "rbf cka": (
        lambda: CkaEstimator(kernel="rbf"),
        lambda x, y: plain.cka(plain.rbf(x), plain.rbf(y), False),
    ),
    "rbf cka, unbiased, narrow": (
        lambda: CkaEstimator(kernel="rbf", threshold=0.4, mode="robust"),
        lambda x, y: plain.cka(plain.rbf(x, 0.4), plain.rbf(y, 0.4), True),
    ),
    "linear cka of a bank": (
        lambda: CkaEstimator(bank_size=4096),
        lambda x, y: plain.cka(plain.inner(x), plain.inner(y), False),
    ),
    "linear cka of a bank, unbiased": (
        lambda: CkaEstimator(bank_size=4096, unbiased=True),
        lambda x, y: plain.cka(plain.inner(x), plain.inner(y), True),
    ),
    "distance correlation": (
        lambda: DistanceCorrelationEstimator(),
        lambda x, y: plain.distance_correlation(x, y, True),
    ),
    "distance correlation, biased": (
        lambda: DistanceCorrelationEstimator(unbiased=False),
        lambda x, y: plain.distance_correlation(x, y, False),
    ),
    "cknna": (lambda: CknnaEstimator(), lambda x, y: plain.cknna(x, y, 10)),
    "cknna, 3": (lambda: CknnaEstimator(k=3), lambda x, y: plain.cknna(x, y, 3)),
} | {
    f"rsa, {rdm}, {comparison}": (
        lambda rdm=rdm, comparison=comparison: RsaEstimator(rdm=rdm, comparison=comparison),
        lambda x, y, rdm=rdm, comparison=comparison: plain.rsa(x, y, rdm, comparison),
    )
    for rdm in ("correlation", "cosine", "euclidean")
    for comparison in ("spearman", "pearson")
}
every = pytest.mark.parametrize("name", CASES)


def on_a_bank(estimator, *rows):
    """Score rows by the route of a stream, in one update."""
    batch = Batch({f"layer {i}": x for i, x in enumerate(rows)}, torch.arange(rows[0].shape[-2]))
    return estimator.score(estimator.update(estimator.init(batch), batch))


def value(name, *rows):
    return float(on_a_bank(CASES[name][0](), *rows)["score"][0, 1])


def agrees(name, x, y, **tolerance):
    assert value(name, x, y) == pytest.approx(float(CASES[name][1](x, y)), **tolerance)


class TestValue:
    @every
    @pytest.mark.parametrize("n", [12, 60, 300])
    def test_float64_agrees_with_plain_matrices(self, name, n):
        agrees(name, *plain.related(n), rel=1e-9, abs=1e-12)

    @every
    @pytest.mark.parametrize("offset", [0.0, 1000.0])
    def test_float32_agrees_at_an_offset_of_a_thousand_deviations(self, name, offset):
        x, y = plain.related(250, 10, 30)
        agrees(name, (x + offset).float(), (y - offset).float(), rel=1e-4, abs=1e-6)

    @every
    def test_rows_that_repeat_and_distances_that_tie(self, name):
        x, y = plain.related(120)
        repeated = x[torch.arange(120) % 50].contiguous()
        agrees(name, repeated, y, rel=1e-9)
        agrees(name, repeated.float(), y.float(), rel=1e-4)
        lattice = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0), torch.arange(6.0)).double()
        agrees(name, lattice + 1, y, rel=1e-9)
        agrees(name, lattice.float() + 1, y.float(), rel=1e-4, abs=1e-5)

    @every
    def test_few_columns_more_columns_than_rows_and_two_layers_of_one_width(self, name):
        x, y = plain.related(40, 0, 90)
        agrees(name, x, y, rel=1e-9, abs=1e-12)
        agrees(name, y, y.flip(1) ** 3, rel=1e-9, abs=1e-12)

    @every
    @pytest.mark.parametrize("scale", [1e-25, 1e25])
    def test_scales_beyond_the_square_root_of_float32(self, name, scale):
        x, y = (z.float() for z in plain.related(60))
        assert value(name, x * scale, y) == pytest.approx(value(name, x, y), rel=1e-4)

    @every
    def test_outliers_cost_no_digits(self, name):
        x, y = plain.related(100)
        x[7] *= 3e3
        agrees(name, x, y, rel=1e-9)
        agrees(name, x.float(), y.float(), rel=2e-3, abs=1e-4)

    @every
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_counts_in_full(self, name, dtype):
        x, y = (z.to(dtype) for z in plain.related(60))
        agrees(name, x, y, rel=1e-4, abs=1e-6)


class TestClosedForms:
    @every
    def test_a_copy_scores_one_and_independent_rows_nearly_zero(self, name):
        x, _ = plain.related(300)
        assert value(name, x, x.clone()) == pytest.approx(1, abs=1e-12)
        independent = torch.randn(300, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        assert abs(value(name, x, independent)) < 0.12

    def test_three_points(self):
        # Distances 1, 3, 2 against 4, 5, 1: ranks 1, 3, 2 against 2, 3, 1.
        x, y = torch.tensor([[0.0], [1.0], [3.0]]).double(), torch.tensor([[0.0], [4.0], [5.0]]).double()
        assert float(on_a_bank(RsaEstimator(rdm="euclidean"), x, y)["score"][0, 1]) == pytest.approx(0.5)
        pearson = on_a_bank(RsaEstimator(rdm="euclidean", comparison="pearson"), x, y)["score"][0, 1]
        assert float(pearson) == pytest.approx(np.corrcoef([1, 3, 2], [4, 5, 1])[0, 1])

    def test_two_points_each_and_distance_correlation(self):
        # Doubly centred, two groups against the same two groups: the distances are all that matters, hence 1.
        x = torch.tensor([[0.0], [1.0]]).double()
        assert float(on_a_bank(DistanceCorrelationEstimator(unbiased=False), x, 5 - x)["score"][0, 1]) == 1.0

    def test_normal_variables_have_a_known_distance_correlation(self):
        # Szekely, Rizzo, Bakirov 2007, theorem 7, for correlation rho.
        rho = 0.7
        g = torch.Generator().manual_seed(3)
        x, noise = torch.randn(2, 2000, 1, generator=g, dtype=torch.float64)
        y = rho * x + math.sqrt(1 - rho**2) * noise
        above = rho * math.asin(rho) + math.sqrt(1 - rho**2) - rho * math.asin(rho / 2) - math.sqrt(4 - rho**2) + 1
        expected = above / (1 + math.pi / 3 - math.sqrt(3))
        found = on_a_bank(DistanceCorrelationEstimator(), x, y)
        assert float(found["score"][0, 1]) == pytest.approx(expected, abs=4 * float(found["se"][0, 1]))
        assert float(found["se"][0, 1]) < 0.03

    def test_a_wide_rbf_kernel_is_linear(self):
        x, y = plain.related(200)
        wide = CkaEstimator(kernel="rbf", threshold=300.0)
        linear = plain.cka(plain.inner(x), plain.inner(y), False)
        assert float(on_a_bank(wide, x, y)["score"][0, 1]) == pytest.approx(linear, rel=1e-4)

    def test_all_neighbours_are_linear_cka_without_the_diagonal(self):
        x, y = plain.related(50)
        p, q = (plain.inner(z) - np.diag(np.diag(plain.inner(z))) for z in (x, y))
        expected = (p * q).sum() / np.sqrt((p * p).sum() * (q * q).sum())
        found = on_a_bank(CknnaEstimator(k=49), x, y)["score"][0, 1]
        assert float(found) == pytest.approx(expected, rel=1e-9)

    def test_the_bias_of_many_columns_is_removed(self):
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, 64, 512, generator=g)
        for make in (lambda **o: CkaEstimator(kernel="rbf", **o), lambda **o: DistanceCorrelationEstimator(**o)):
            biased, fair = (float(scored(make(unbiased=u), x, y)["score"][0, 1]) for u in (False, True))
            assert biased > 0.6 and abs(fair) < 0.05


class TestInvariances:
    """What a spec lists keeps the value, what it leaves out does not."""

    @staticmethod
    def transforms(d):
        g = torch.Generator().manual_seed(1)
        normal = torch.randn(d, d, generator=g, dtype=torch.float64)
        return {
            "permutation": lambda x: x[:, torch.randperm(d, generator=g)],
            "orthogonal": lambda x: x @ torch.linalg.qr(normal).Q,
            "isotropic scaling": lambda x: -7.5 * x,
            "translation": lambda x: x + 20 * normal[0],
            "invertible linear": lambda x: x @ normal,
        }

    @every
    def test_declared_ones_hold_and_others_fail(self, name):
        x, y = plain.related(80)
        before, declared = value(name, x, y), set(CASES[name][0]().spec.invariant_to)
        if "cosine" in name:
            declared.add("orthogonal")
        if "euclidean" in name:
            declared |= {"orthogonal", "translation"}
        for change, transform in self.transforms(x.shape[1]).items():
            kept = value(name, transform(x), y) == pytest.approx(before, rel=1e-8)
            assert kept == (change in declared), change

    @every
    def test_symmetric_and_blind_to_the_order_of_samples(self, name):
        x, _ = plain.related(80)
        x = x[torch.arange(80) % 60]
        y = x[:, 2:].exp()
        order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
        both = on_a_bank(CASES[name][0](), x, y)["score"]
        torch.testing.assert_close(both, both.T, rtol=0, atol=0)
        assert value(name, x[order], y[order]) == pytest.approx(float(both[0, 1]), rel=1e-9)
        assert value(name, x, y[order]) < both[0, 1] / 2

    @every
    def test_a_layer_may_be_one_among_many(self, name):
        x, y = plain.related(70)
        others = [x.square(), torch.cat([x, y], 1), y * 1e3]
        both = on_a_bank(CASES[name][0](), x, *others, y)["score"]
        assert float(both[0, -1]) == pytest.approx(value(name, x, y), rel=1e-9)


class TestStreams:
    @every
    def test_streamed_merged_and_one_shot_agree(self, name):
        estimator, ids = CASES[name][0](), torch.arange(90) * 7
        rows = dict(zip("ab", plain.related(90), strict=True))
        parts = [Batch({k: x[p] for k, x in rows.items()}, ids[p]) for p in torch.arange(90).split([20, 1, 49, 20])]
        states = [estimator.update(estimator.init(part), part) for part in parts]
        merged = states[2].merge(states[0]).merge(states[3].merge(states[1]))
        td = TensorDict({"data_a": rows["a"], "data_b": rows["b"]})
        single = float(estimator(td)[estimator.out_keys[0]])
        assert float(estimator.score(merged)["score"][0, 1]) == pytest.approx(single, rel=1e-6)
        assert isinstance(estimator.statistic(), Reservoir)

    @every
    def test_leading_dimensions_are_data_sets(self, name):
        sets = [plain.related(30, seed=seed) for seed in range(6)]
        x, y = (torch.stack(z).unflatten(0, (2, 3)) for z in zip(*sets, strict=True))
        found = on_a_bank(CASES[name][0](), x, y)
        expected = torch.stack([on_a_bank(CASES[name][0](), *rows)["score"] for rows in sets]).view(2, 3, 2, 2)
        torch.testing.assert_close(found["score"], expected)
        assert found["se"].shape == (2, 3, 2, 2) and found["finite"].shape == (2, 3, 2)

    @every
    def test_an_empty_batch_gives_an_empty_result(self, name):
        td = TensorDict({"data_a": torch.zeros(0, 20, 3), "data_b": torch.zeros(0, 20, 2)}, batch_size=[0])
        estimator = CASES[name][0]()
        assert estimator(td)[estimator.out_keys[0]].shape == (0,)

    @every
    def test_autocast_and_inference_mode_are_the_models_business(self, name):
        x, y = (z.float() for z in plain.related(40))
        before = value(name, x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            assert value(name, x, y) == before


class TestErrorBars:
    @pytest.mark.parametrize("name", [n for n in CASES if not {"cosine", "narrow", "3"} & set(n.split(", "))])
    def test_they_are_the_spread_over_data_sets(self, name):
        sets = [plain.related(100, seed=seed) for seed in range(60)]
        x, y = (torch.stack(z) for z in zip(*sets, strict=True))
        found = on_a_bank(CASES[name][0](), x, y)
        spread, typical = found["score"][:, 0, 1].std(), found["se"][:, 0, 1].square().mean().sqrt()
        # The spread of 60 values is known to 9 %, and leaving out an eighth is a little too cautious.
        assert 0.75 < float(typical / spread) < 1.6

    @every
    def test_a_layer_knows_itself_without_error(self, name):
        assert float(on_a_bank(CASES[name][0](), *plain.related(60))["se"][0, 0]) == pytest.approx(0, abs=1e-12)

    def test_fewer_rows_than_groups_need(self):
        x, y = plain.related(5)
        found = on_a_bank(CkaEstimator(kernel="rbf", unbiased=True), x, y)
        assert found["score"].isfinite().all() and found["se"].isfinite().all()
        # Without one of four rows there is no unbiased product.
        assert on_a_bank(CkaEstimator(kernel="rbf", unbiased=True), x[:4], y[:4])["se"].isnan().all()


class TestEdges:
    @every
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_layer_that_is_not_finite_is_nan_and_the_others_are_not(self, name, bad):
        x, y = plain.related(40)
        broken = x.clone()
        broken[3, 1] = bad
        found = on_a_bank(CASES[name][0](), x, broken, y)
        assert found["finite"].tolist() == [True, False, True]
        assert found["score"][1].isnan().all() and found["score"][:, 1].isnan().all()
        assert float(found["score"][0, 2]) == pytest.approx(value(name, x, y), rel=1e-12)
        with pytest.warns(UserWarning, match="'data_a' held NaN or infinite values"):
            CASES[name][0]()(TensorDict({"data_a": broken, "data_b": y}))

    @every
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_constant_layer_is_nan_even_with_rounding_noise(self, name, dtype):
        x, y = (z.to(dtype) for z in plain.related(40))
        constant = torch.full_like(x, 0.1)
        noisy = constant * (1 + torch.finfo(dtype).eps * torch.randn_like(x).sign())
        found = on_a_bank(CASES[name][0](), x, constant, torch.zeros_like(x), x[:, :0], y)["score"]
        assert found[1:4].isnan().all() and found[:, 1:4].isnan().all() and found[0, 4].isfinite()
        if "correlation, " not in name or "distance" in name:
            assert on_a_bank(CASES[name][0](), noisy, y)["score"][0, 1].isnan()

    @pytest.mark.parametrize(
        ("make", "n", "message"),
        [
            (
                lambda: CkaEstimator(kernel="rbf", unbiased=True),
                3,
                "got 3 rows; cka with unbiased=True needs at least 4",
            ),
            (lambda: DistanceCorrelationEstimator(), 3, "got 3 rows; distance_correlation with unbiased=True.*4"),
            (lambda: DistanceCorrelationEstimator(unbiased=False), 1, "got 1 rows.*unbiased=False needs at least 2"),
            (lambda: RsaEstimator(), 2, "got 2 rows; rsa needs at least 3"),
            (lambda: CknnaEstimator(), 10, r"got 10 rows; cknna with k=10 needs at least k\+1 = 11"),
        ],
    )
    def test_too_few_rows_say_what_is_needed(self, make, n, message):
        x = torch.randn(n + 1, 3)
        with pytest.raises(ConfigError, match=message):
            scored(make(), x[:n], x[:n])
        assert scored(make(), x, x.flip(0))["score"].shape == (2, 2)

    def test_equal_dissimilarities_say_nothing(self):
        x = torch.eye(6, dtype=torch.float64)
        y, _ = plain.related(6)
        for comparison in ("pearson", "spearman"):
            assert on_a_bank(RsaEstimator(rdm="euclidean", comparison=comparison), x, y)["score"][0, 1].isnan()

    def test_rows_without_direction_are_at_dissimilarity_one(self):
        x, y = plain.related(30)
        x[4], x[9] = 0, 0
        for rdm in ("cosine", "correlation"):
            agrees(f"rsa, {rdm}, pearson", x, y, rel=1e-9)
        level = torch.cat([x[:20] + 1, torch.full((10, 7), 0.3, dtype=torch.float64)])
        found = value("rsa, correlation, pearson", level, y)
        centred = level - level.mean(1, keepdim=True)
        centred[20:] = 0
        assert found == pytest.approx(plain.rsa(centred, y - y.mean(1, keepdim=True), "cosine", "pearson"), rel=1e-9)

    def test_more_copies_than_candidates_all_count(self):
        x, y = plain.related(60)
        copies = torch.cat([x[:1].expand(40, -1), x[40:]]).contiguous()
        for rows in ((copies, y), (copies.float(), y.float())):
            agrees("cknna, 3", *rows, rel=1e-5)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: CkaEstimator(kernel="rbf", threshold=0), "threshold=0; allowed are positive"),
            (lambda: CkaEstimator(kernel="rbf", minibatch=True), "minibatch=True and kernel='rbf'"),
            (lambda: CkaEstimator(minibatch=True, bank_size=9), "minibatch=True and bank_size=9"),
            (lambda: CkaEstimator(mode="robustt"), "unknown mode 'robustt'; did you mean 'robust'"),
            (lambda: RsaEstimator(rdm="cosin"), "unknown rdm 'cosin'; did you mean 'cosine'"),
            (lambda: RsaEstimator(comparison="kendall"), "unknown comparison 'kendall'"),
            (lambda: CknnaEstimator(k=0), "k=0; allowed are integers from 1 on"),
            (lambda: CknnaEstimator(k=True), "k=True"),
            (lambda: DistanceCorrelationEstimator(mode="x"), "unknown mode 'x'"),
        ],
    )
    def test_arguments_are_checked_at_construction(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class TestModes:
    def test_cka_is_biased_in_strict_and_unbiased_in_robust_mode_unless_told(self):
        x, y = plain.related(40)
        for options in ({}, {"kernel": "rbf"}, {"bank_size": 99}, {"minibatch": True}):
            found = {
                (mode, unbiased): float(
                    scored(CkaEstimator(mode=mode, unbiased=unbiased, **options), x, y)["score"][0, 1]
                )
                for mode in ("strict", "robust")
                for unbiased in (None, False, True)
            }
            assert found["strict", None] == found["strict", False] == found["robust", False]
            assert found["robust", None] == found["robust", True] == found["strict", True] != found["strict", None]

    def test_where_modes_agree(self):
        x, y = plain.related(40)
        for make in (RsaEstimator, DistanceCorrelationEstimator, CknnaEstimator):
            one, other = (scored(make(mode=mode), x, y)["score"] for mode in ("strict", "robust"))
            assert torch.equal(one, other)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(11, 40), seed=st.integers(0, 99), name=st.sampled_from(sorted(CASES)), copies=st.integers(1, 7))
def test_any_small_sample_agrees_with_plain_matrices(n, seed, name, copies):
    x, y = plain.related(n, seed=seed)
    agrees(name, x[torch.arange(n).clamp(min=copies - 1)].contiguous(), y, rel=1e-8, abs=1e-10)
