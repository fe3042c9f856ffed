"""Modularity, SAP, DCI, smoothness and monotonicity: by hand, against plain references, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disentanglement_tools import kraskov, ross
from tdprobe.errors import ConfigError
from tdprobe.latent import disentanglement as d
from tdprobe.latent.disentanglement.dci import dci_of
from tdprobe.latent.disentanglement.modularity import modularity_of


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


class TestModularity:
    def test_by_hand(self):
        matrix = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 1.0], [4.0, 2.0, 0.0], [0.0, 0.0, 0.0]]).double()
        assert modularity_of(matrix).tolist() == pytest.approx([1, 0, 1 - 0.25 / 2, 0])

    @pytest.mark.parametrize("discrete", [False, True])
    def test_of_data(self, discrete):
        z = normal(120, 4)
        a = z[:, :3] @ normal(3, 3, seed=1)
        a = (a > 0) * 1.0 if discrete else a
        one = ross if discrete else kraskov
        squares = np.array([[one(z[:, i], a[:, j]) for j in range(3)] for i in range(4)]) ** 2
        most = squares.max(1)
        expected = np.where(most > 0, 1 - (squares.sum(1) / np.where(most > 0, most, 1) - 1) / 2, 0)
        np.testing.assert_allclose(d.modularity(z, a, discrete=discrete), expected, rtol=1e-10)

    def test_kinds_and_refusals(self):
        z = torch.randn(30, 3)
        assert isinstance(d.modularity(z, z[:, :2]), torch.Tensor) and d.modularity(z.numpy(), z[:, :2]).shape == (3,)
        with pytest.raises(ConfigError, match="a has 1 attributes; needed are 2"):
            d.modularity(z, z[:, 0])
        with pytest.raises(ConfigError, match="thresh=-1"):
            d.modularity(z, z, thresh=-1)
        constant = torch.ones(30, 2)
        assert d.modularity(z, constant).tolist() == [0, 0, 0]


class TestSap:
    @pytest.mark.parametrize("reg_dim", [None, [3, 1]])
    def test_gap_in_squared_correlation(self, reg_dim):
        z, a = normal(80, 4), normal(80, 2, seed=1)
        a[:, 0] += 2 * z[:, 2]
        r = np.array([[np.corrcoef(z[:, i], a[:, j])[0, 1] ** 2 for j in range(2)] for i in range(4)])
        if reg_dim is None:
            expected = np.sort(r, 0)[-1] - np.sort(r, 0)[-2]
        else:
            expected = [r[k, j] - np.delete(r[:, j], k).max() for j, k in enumerate(reg_dim)]
        np.testing.assert_allclose(d.sap(z, a, reg_dim), expected, rtol=1e-10)

    def test_gap_in_accuracy(self):
        z = normal(90, 3)
        a = (z[:, :2] > 0.3).astype(int) * 5
        found = d.sap(z, a, discrete=True)
        # One latent separates each attribute; the best other one is little better than always saying 0.
        assert ((found > 0.15) & (found < 1 - a.mean(0) / 5)).all()
        np.testing.assert_array_equal(found, d.sap(torch.tensor(z), torch.tensor(a), discrete=True).numpy())
        from sklearn.svm import LinearSVC

        column = z[:, [1]]
        accuracy = [LinearSVC(random_state=0).fit(z[:, [i]], a[:, 1]).score(z[:, [i]], a[:, 1]) for i in range(3)]
        assert found[1] == pytest.approx(np.sort(accuracy)[-1] - np.sort(accuracy)[-2])
        assert accuracy[1] == LinearSVC(random_state=0).fit(column, a[:, 1]).score(column, a[:, 1])

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-5, 5).filter(lambda x: abs(x) > 1e-2))
    def test_scale_and_shift_do_not_matter_and_turning_does(self, seed, scale):
        z, a = normal(40, 3, seed=seed), normal(40, 2, seed=seed + 1)
        a[:, 0] += z[:, 0]
        np.testing.assert_allclose(d.sap(scale * z + 9, 7 - a), d.sap(z, a), rtol=1e-8, atol=1e-12)

    @pytest.mark.parametrize("discrete", [False, True])
    def test_degenerate(self, discrete):
        z, a = normal(30, 3), np.ones((30, 2))
        a[:15, 1] = 0
        z[:, 2] = 5
        with pytest.warns(UserWarning, match="attribute 0: the score is NaN, for the attribute is constant"):
            found = d.sap(z, a, discrete=discrete)
        assert np.isnan(found).tolist() == [True, False]

    def test_refusals(self):
        with pytest.raises(ConfigError, match="l2_reg=0"):
            d.sap(normal(10, 2), normal(10, 1), l2_reg=0)
        with pytest.raises(ConfigError, match="needed are 2 features"):
            d.sap(normal(10, 1), normal(10, 1))


class TestDci:
    def test_by_hand(self):
        importance = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        found = dci_of(importance, torch.tensor([0.5, 0.25], dtype=torch.float64))
        assert found["by_latent"][:3].tolist() == pytest.approx([1, 1, 0]) and found["by_latent"][3].isnan()
        assert found["disentanglement"].item() == pytest.approx((1 * 1 + 1 * 2 + 0 * 2) / 5)
        half, thirds = math.log(2), -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
        complete = [1 - half / math.log(4), 1 - thirds / math.log(4)]
        assert found["by_attribute"].tolist() == pytest.approx(complete)
        assert found["completeness"].item() == pytest.approx((complete[0] * 2 + complete[1] * 3) / 5)

    @pytest.mark.parametrize("model", ["lasso", "forest", "boosting"])
    @pytest.mark.parametrize("discrete", [False, True, [True, False]])
    def test_one_latent_each_against_all_latents_mixed(self, model, discrete):
        z = normal(300, 3)
        a = z[:, :2].copy()
        flags = [discrete] * 2 if isinstance(discrete, bool) else discrete
        for i in range(2):
            a[:, i] = (a[:, i] > 0) if flags[i] else a[:, i]
        pure = d.dci(z, a, discrete, model=model)
        mixed = d.dci(z @ np.linalg.qr(normal(3, 3, seed=4))[0], a, discrete, model=model)
        # Trees that are asked for 0 and 1 find some noise too.
        assert pure["disentanglement"] > max(0.5, mixed["disentanglement"] + 0.2)
        assert pure["completeness"] > max(0.5, mixed["completeness"] + 0.2)
        assert (pure["informativeness"] > 0.85).all()

    def test_informativeness_is_measured_elsewhere(self):
        found = d.dci(normal(60, 40), normal(60, 2, seed=1), model="lasso")
        assert (found["informativeness"] < 0.2).all()

    def test_a_constant_attribute_counts_nowhere(self):
        z = normal(100, 4)
        a = np.stack([z[:, 0], np.ones(100), z[:, 1]], 1)
        with pytest.warns(UserWarning, match="attribute 1"):
            found = d.dci(z, a)
        two = d.dci(z, a[:, [0, 2]])
        for name in ("disentanglement", "completeness"):
            assert found[name] == pytest.approx(float(two[name]), rel=1e-12)
        assert np.isnan(found["informativeness"]).tolist() == [False, True, False]

    @pytest.mark.parametrize("model", ["lasso", "forest"])
    def test_the_order_of_the_rows_does_not_matter(self, model):
        z = normal(60, 3)
        a, order = z[:, :2] + normal(60, 2, seed=1), np.random.default_rng(2).permutation(60)
        found, again = d.dci(z, a, model=model), d.dci(z[order], a[order], model=model)
        np.testing.assert_allclose(found["importance"], again["importance"], rtol=1e-9, atol=1e-12)
        assert not np.allclose(found["importance"], d.dci(z, a, model=model, seed=1)["importance"])

    def test_kinds_and_seeds(self):
        z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        found, again = (d.dci(z, z[:, :3], model="forest") for _ in range(2))
        assert all(isinstance(value, torch.Tensor) and torch.equal(value, again[name]) for name, value in found.items())
        assert found["importance"].shape == (4, 3) and found["by_latent"].shape == (4,)

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((normal(20, 3), normal(20, 1)), {}, "a has 1 attributes; needed are 2 or more"),
            ((normal(20, 1), normal(20, 2)), {}, "needed are 2 features"),
            ((normal(7, 3), normal(7, 2)), {}, "needs 8 or more"),
            ((normal(20, 3), normal(20, 2)), {"model": "laso"}, "did you mean 'lasso'"),
            ((normal(20, 3), normal(20, 2)), {"alpha": 0}, "alpha=0"),
        ],
    )
    def test_refusals(self, arguments, options, message):
        with pytest.raises(ConfigError, match=message):
            d.dci(*arguments, **options)


T = np.linspace(-1, 2, 7)


class TestInterpolation:
    def test_monotone_by_hand(self):
        a = np.array([[0, 1, 3, 2, 2, 2.0002, 5]])
        # Three steps up, one down, two that are noise.
        assert d.monotonicity(T[None], a).tolist() == pytest.approx([(3 - 1) / 4])
        assert d.monotonicity(T[None], a, liad_thresh=0).tolist() == pytest.approx([(4 - 1) / 5])
        assert d.monotonicity(T[None, ::-1], a).tolist() == pytest.approx([-(3 - 1) / 4])

    @pytest.mark.parametrize("max_mode", ["lehmer", "naive"])
    @pytest.mark.parametrize("ptp_mode", ["naive", 0.5])
    def test_smooth_against_a_plain_reference(self, max_mode, ptp_mode):
        z, a = np.tile(T, (4, 3, 1)), normal(4, 2, 7)
        found = d.smoothness(z, a, reduce_mode="none", max_mode=max_mode, ptp_mode=ptp_mode, p=3.0)
        for i in range(4):
            for j in range(2):
                first = np.diff(a[i, j]) / 0.5
                bend = abs(np.diff(first)) / 0.5
                top = bend.max() if max_mode == "naive" else (bend**3).sum() / (bend**2).sum()
                low, high = (first.min(), first.max()) if ptp_mode == "naive" else np.quantile(first, [0.25, 0.75])
                assert found[i, j] == pytest.approx(1 - top / ((high - low) / 0.5), rel=1e-9)

    def test_parabolas_and_lines(self):
        # The second difference of a parabola is constant, and a fifth of the range of the six first ones, per step.
        assert d.smoothness(T[None], T[None] ** 2).tolist() == pytest.approx([1 - 1 / 5])
        lines = np.stack([3 * T, 0 * T + 2, -T])[:, None]
        assert d.smoothness(np.tile(T, (3, 1, 1)), lines).tolist() == pytest.approx([1])
        assert d.smoothness(-T[None], T[None] ** 2).tolist() == pytest.approx([1 - 1 / 5])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("t", [3, 7, 11, 33])
    def test_a_line_is_straight_whatever_rounding_makes_of_it(self, t, dtype):
        # Its slopes differ by rounding, and of rounding alone the formula makes anything from 0 to 1.
        start, stop, factor, offset = torch.from_numpy(normal(4, 50, 1)).to(dtype)
        z = start + (stop - start).sign() * (1 + (stop - start).abs()) * torch.linspace(0, 1, t).to(dtype)
        assert d.smoothness(z, 3 * factor * z + 9 * offset, reduce_mode="none").tolist() == [[1]] * 50
        bent = torch.linspace(-1, 2, 7).to(dtype)[None]
        assert d.smoothness(bent, bent**2).item() == pytest.approx(1 - 1 / 5, abs=1e-3)

    def test_unequal_steps(self):
        # Slopes of a parabola are sums of neighbours, so that bends are x_(k+2) - x_k, and all have one sign.
        x = np.array([[-2, -1.5, 0, 0.1, 2, 5]])
        bends = x[:, 2:] - x[:, :-2]
        expected = 1 - (bends**2).sum(1) / bends.sum(1) ** 2
        np.testing.assert_allclose(d.smoothness(x, x**2), expected, rtol=1e-12)
        np.testing.assert_allclose(d.smoothness(5 - 3 * x, 7 - x**2), expected, rtol=1e-12)

    def test_the_middle_of_the_slopes_may_be_level(self):
        a = np.array([[0, 0, 0, 0, 0, 0, 4.0]])
        assert d.smoothness(T[None], a).tolist() == [0] and d.smoothness(T[None], a, ptp_mode=0.5) == -np.inf
        assert d.smoothness(T[None], a, ptp_mode=0.5, clamp=True).tolist() == [0]

    def test_reductions(self):
        z, a = np.tile(T, (4, 2, 1)), normal(4, 2, 7)
        for function in (d.smoothness, d.monotonicity):
            full = function(z, a, reduce_mode="none")
            np.testing.assert_allclose(function(z, a), full.mean(0))
            np.testing.assert_allclose(function(z, a, reduce_mode="sample"), full.mean(1))
            np.testing.assert_allclose(function(z, a, reduce_mode="all"), full.mean())

    def test_the_dimension_that_moves(self):
        z = np.stack([T, T**3, 5 - T])[None]
        a = np.stack([T, T])[None]
        assert d.monotonicity(z, a, [2, 0]).tolist() == [-1, 1]

    def test_nothing_but_noise(self):
        z, a = np.tile(T, (2, 1)), np.stack([T, 0 * T])
        assert d.monotonicity(z, a).tolist() == [1]
        assert d.monotonicity(z, a, degenerate_val=0.0).tolist() == [0.5]
        with pytest.warns(UserWarning, match="means may be NaN"):
            assert np.isnan(d.monotonicity(z, a, nanmean=False)).all()
        assert np.isnan(d.monotonicity(z[:1], a[1:])).all()

    def test_clamp_and_kinds(self):
        z, a = torch.tensor(T).expand(2, 7), torch.randn(2, 7)
        found = d.smoothness(z, a, reduce_mode="none", max_mode="naive")
        assert torch.equal(d.smoothness(z, a, reduce_mode="none", max_mode="naive", clamp=True), found.clamp(0, 1))
        assert found.dtype == torch.float64 and isinstance(d.monotonicity(z.numpy(), a.numpy()), np.ndarray)
        half = torch.linspace(0, 1, 9).half().expand(2, 9)
        assert d.smoothness(half, half).tolist() == [1.0]

    @pytest.mark.parametrize(
        ("z", "a", "options", "message"),
        [
            (T, T, {}, r"z has shape \(7,\)"),
            (T[None], T[None, :-1], {}, "at 7 places and a has 1 at 6"),
            (T[None, :2], T[None, :2], {}, "3 places or more"),
            (T[None], np.ones((1, 2, 7)), {}, "as many latent dimensions as attributes"),
            (0 * T[None], T[None], {}, "stands still"),
            (T[None], np.where(T[2] == T, np.nan, T)[None], {}, "a holds NaN"),
            (T[None], T[None], {"liad_mode": "central"}, "unknown liad_mode 'central'"),
            (T[None], T[None], {"max_mode": "lemer"}, "did you mean 'lehmer'"),
            (T[None], T[None], {"reduce_mode": "samples"}, "did you mean 'sample'"),
            (T[None], T[None], {"ptp_mode": 0.0}, "ptp_mode=0.0"),
            (T[None], T[None], {"ptp_mode": "wide"}, "ptp_mode='wide'"),
            (T[None], T[None], {"p": 1.0}, "p=1.0"),
            (T[None], T[None], {"reg_dim": [1]}, r"reg_dim is \[1\]"),
        ],
    )
    def test_refusals(self, z, a, options, message):
        with pytest.raises(ConfigError, match=message):
            d.smoothness(z, a, **options)
