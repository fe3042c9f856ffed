"""Mutual information by neighbours: against plain loops, with and without ties, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disentanglement_tools import EQUAL, kraskov, ross, sklearn_mi, table, tied_columns
from tdprobe.latent.disentanglement import kraskov as module
from tdprobe.latent.disentanglement import mutual_information
from tdprobe.latent.disentanglement.classes import class_entropy, contingency
from tdprobe.latent.disentanglement.classes import ross as fast_ross
from tdprobe.latent.disentanglement.columns import WIDTH, Columns, inside
from tdprobe.latent.disentanglement.kraskov import kraskov as fast_kraskov
from tdprobe.latent.disentanglement.kraskov import kraskov_entropy
from tdprobe.latent.disentanglement.radii import Plane, radii


def columns(*arrays):
    return Columns.of(torch.from_numpy(np.stack(arrays, 1)))


def continuous(n, c, seed=0):
    return np.random.default_rng(seed).normal(size=(n, c))


SPREAD = {
    "normal": continuous(100, 2).T,
    "heavy": continuous(100, 2, 1).T ** 9,
    "one far away": np.where(np.arange(100) == 0, 1e8, continuous(100, 2, 2).T),
    "scales": continuous(100, 2, 3).T * [[1e-155], [1e120]],
}


class TestCountsInALine:
    def test_the_distance_decides_and_not_its_sum_with_the_centre(self):
        # A search for centre + radius would let the border in, or leave too much out.
        x = torch.tensor([[-1e-20, 0.0, 0.1, 0.3, 0.30000000000000004, 1.0]], dtype=torch.float64)
        held = Columns(x, torch.arange(6).unsqueeze(0))
        for centre in x[0].tolist():
            for radius in {abs(v - centre) for v in x[0].tolist()} - {0.0}:
                for closed in (False, True):
                    distance = (x[0] - centre).abs()
                    near = (distance <= radius * (1 + EQUAL) if closed else distance < radius * (1 - EQUAL)).nonzero()
                    asked = torch.tensor([[centre], [radius]], dtype=torch.float64)
                    first, end = inside(held.padded, torch.tensor([0]), *asked, closed=closed)
                    assert list(range(int(first), int(end))) == near.flatten().tolist()

    def test_copies_and_groups(self):
        held = Columns.of(torch.tensor([[2.0, 5.0], [1.0, 5.0], [2.0, 5.0]], dtype=torch.float64))
        assert held.copies.tolist() == [[1, 2, 2], [3, 3, 3]] and held.group.tolist() == [[0, 1, 1], [0, 0, 0]]
        assert held.scale.tolist() == [pytest.approx((2 / 9) ** 0.5), 1.0]


class TestRadii:
    @pytest.mark.parametrize("shape", ["normal", "heavy", "clusters", "line", "rectified"])
    @pytest.mark.parametrize("n", [5, 40, 300])
    def test_are_the_distances_of_the_kth_neighbours(self, n, shape):
        g = np.random.default_rng(n)
        x, y = g.normal(size=(n, 3)), g.normal(size=(n, 2))
        if shape == "heavy":
            x, y = x**9, np.exp(3 * y)
        elif shape == "clusters":
            x, y = 1e-6 * x + g.integers(0, 2, (n, 3)), 1e-6 * y + g.integers(0, 2, (n, 2))
        elif shape == "line":
            x = np.repeat(y[:, :1], 3, 1) * [1, -2, 1e-3]
        elif shape == "rectified":
            x, y = x.clip(0), y.clip(0)
        plane = Plane(columns(*x.T), columns(*y.T))
        found = radii(plane, 3)
        for c in range(3):
            for m in range(2):
                factor = float(plane.factor[c, m])
                order = plane.x.order[c].numpy()
                u, v = x[order, c], y[order, m]
                d = np.maximum(abs(u[:, None] - u), abs(v[:, None] - v) * factor)
                np.testing.assert_array_equal(found[c, m].numpy(), np.sort(d, 1)[:, 3])

    @pytest.mark.parametrize("shape", [*SPREAD, *tied_columns()])
    def test_rounded_are_off_by_less_than_one(self, shape):
        x, y = SPREAD[shape] if shape in SPREAD else tied_columns()[shape]
        plane = Plane(columns(x), columns(y))
        for axis, rounded in ((plane.x, plane.rounded.x), (plane.y, plane.rounded.y)):
            whole, exact = rounded.values[0].double(), axis.values[0] * (float(plane.unit) / float(axis.scale))
            assert rounded.values.dtype == torch.int32 and rounded.values.abs().max() <= WIDTH
            # What float64 keeps of values far from 0 is what it may lose in the product above.
            lost = float(exact.abs().max()) * 2**-50
            assert (whole - whole[:, None] - (exact - exact[:, None])).abs().max() <= 1 + 1e-4 + lost

    @pytest.mark.parametrize("shape", [*SPREAD, *tied_columns()])
    @pytest.mark.parametrize("k", [1, 3])
    def test_of_rounded_values_bound_those_of_exact_ones(self, shape, k):
        x, y = SPREAD[shape] if shape in SPREAD else tied_columns()[shape]
        plane = Plane(columns(x), columns(y))
        found, flat = radii(plane.rounded, k), torch.arange(len(x))
        u, v = plane.rounded.x.values[0], plane.rounded.across[0, 0]
        distance = torch.maximum((u[:, None] - u).abs(), (v[:, None] - v).abs())
        assert torch.equal(found[0, 0], distance.sort(-1).values[:, k])
        exact = radii(plane, k)[0, 0]
        above, unit = plane.unrounded(found.flatten(), flat), float(plane.x.scale / plane.unit)
        assert (exact < above * (1 - EQUAL)).all() and (exact > above - 4 * unit).all()


class TestContinuous:
    @pytest.mark.parametrize("n", [4, 5, 30, 400])
    def test_equals_scikit_learn_where_no_value_repeats(self, n):
        x = continuous(n, 4)
        y = 0.7 * x[:, :2] + 0.5 * continuous(n, 2, 1)
        expected = [[sklearn_mi(x[:, d], y[:, i]) for i in range(2)] for d in range(4)]
        np.testing.assert_allclose(mutual_information(x, y), expected, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("name", tied_columns())
    def test_counts_as_a_plain_loop_does_whatever_repeats(self, name):
        x, y = tied_columns()[name]
        found = fast_kraskov(columns(x), columns(y), 3)
        assert float(found) == pytest.approx(kraskov(x, y), rel=1e-12, abs=1e-13)

    @pytest.mark.parametrize("size", [1e-6, 1e-7, 3e-8, 1e-9, 1e-11])
    @pytest.mark.parametrize("offset", [0.0, 1e4])
    @pytest.mark.parametrize("copies", [8, 100])
    def test_differences_that_rounding_would_not_see(self, size, offset, copies):
        # Few and many samples are so close to others that neither int32 nor float32 tells them apart.
        z = continuous(200, 2)
        z[:copies] = z[copies // 2] + size * continuous(copies, 2, 1)
        x, y = (z + offset).T
        for k in (1, 3):
            assert float(fast_kraskov(columns(x), columns(y), k)) == pytest.approx(
                kraskov(x, y, k), rel=1e-12, abs=1e-13
            )

    @pytest.mark.parametrize("seed", range(8))
    def test_borders_that_rounding_puts_in_another_order(self, seed):
        # The nearest neighbour of some samples differs from them in y by as much, but for less than rounding keeps, as
        # another sample does in x, which is far in y.
        g = np.random.default_rng(seed)
        x, y = g.normal(size=(2, 200))
        gap, more = g.uniform(1e-4, 1e-3, 6), g.uniform(-1e-8, 1e-8, 6)
        x[6:12] = x[:6]
        for _ in range(9):  # which moves the standard deviations too
            x[12:18], y[6:12] = x[:6] + (gap + more) * np.std(x), y[:6] + gap * np.std(y)
        plane = Plane(columns(x), columns(y))
        assert 6 <= len(module._counted(plane.rounded, 1, torch.zeros(201))[-1]) <= 25
        assert float(fast_kraskov(columns(x), columns(y), 1)) == pytest.approx(kraskov(x, y, 1), rel=1e-12, abs=1e-13)

    @pytest.mark.parametrize("name", tied_columns())
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_other_numbers_of_neighbours(self, name, k):
        x, y = tied_columns(40)[name] if name != "grid" else tied_columns(80)[name]
        assert float(fast_kraskov(columns(x), columns(y), k)) == pytest.approx(kraskov(x, y, k), rel=1e-12, abs=1e-13)

    @pytest.mark.parametrize("name", tied_columns())
    def test_the_order_of_the_rows_does_not_matter(self, name):
        x, y = tied_columns(200, seed=3)[name]
        order = np.random.default_rng(5).permutation(len(x))
        found, again = (fast_kraskov(columns(u), columns(v), 3) for u, v in ((x, y), (x[order], y[order])))
        assert float(found) == pytest.approx(float(again), rel=1e-12, abs=1e-13)

    @pytest.mark.parametrize("name", ["rectified and rectified", "rectified and integer", "integer and continuous"])
    def test_lies_within_what_noise_makes_of_it(self, name):
        # scikit-learn breaks ties by noise: its values over seeds, and ours without any.
        from sklearn.feature_selection import mutual_info_regression

        x, y = tied_columns(400)[name]
        noisy = [mutual_info_regression(x[:, None], y, random_state=seed)[0] for seed in range(8)]
        assert float(fast_kraskov(columns(x), columns(y), 3)) == pytest.approx(np.mean(noisy), abs=0.06)

    def test_gaussians_and_independence(self):
        for rho in (0.0, 0.5, 0.9):
            x = continuous(4000, 2, 7)
            y = rho * x[:, 0] + (1 - rho**2) ** 0.5 * x[:, 1]
            found = mutual_information(x[:, :1], y)
            assert float(found[0, 0]) == pytest.approx(-np.log(1 - rho**2) / 2, abs=0.04)

    def test_chunks_do_not_matter(self, monkeypatch):
        x, y = continuous(60, 7), continuous(60, 5, 1).round(1)
        whole = mutual_information(x, y)
        monkeypatch.setattr(module, "CHUNK", {"cpu": 61 * 2})
        np.testing.assert_allclose(mutual_information(x, y), whole, rtol=1e-12)

    def test_entropy_is_what_it_says_of_a_variable_and_itself(self):
        from scipy.special import psi

        x = continuous(90, 2)
        found = kraskov_entropy(columns(*x.T), 3).numpy()
        np.testing.assert_allclose(found, psi(90) - psi(4), rtol=1e-12)
        for u, _ in tied_columns().values():
            assert float(kraskov_entropy(columns(u), 3)) == pytest.approx(kraskov(u, u), rel=1e-12, abs=1e-12)

    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(0, 10**6),
        st.sampled_from(list(tied_columns(16))),
        st.sampled_from([-1.0, 1 / 3, 0.1, 7e9, 1e-200, 1e200]),
    )
    def test_shift_scale_sign_and_swap(self, seed, name, scale):
        x, y = tied_columns(16, seed)[name]
        if name in ("tiny differences", "far off"):
            return
        plain = float(fast_kraskov(columns(x), columns(y), 3))
        assert float(fast_kraskov(columns(scale * x), columns(y), 3)) == pytest.approx(plain, abs=1e-12)
        assert float(fast_kraskov(columns(y), columns(x), 3)) == pytest.approx(plain, abs=1e-12)


class TestDiscrete:
    @pytest.mark.parametrize("n", [200, 500])
    def test_equals_scikit_learn_where_no_value_repeats(self, n):
        # In classes of less than eight its own neighbour search rounds, and then counts one sample too many.
        x = continuous(n, 3)
        labels = (x[:, 0] > 0).astype(int) + (continuous(n, 1, 1)[:, 0] > 0.5)
        expected = [sklearn_mi(x[:, d], labels, discrete=True) for d in range(3)]
        found = mutual_information(x, labels, discrete=True)[:, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("classes", [2, 5, 30])
    @pytest.mark.parametrize("name", tied_columns())
    def test_counts_as_a_plain_loop_does(self, name, classes):
        x, _ = tied_columns()[name]
        labels = np.random.default_rng(classes).integers(0, classes, len(x))
        found = fast_ross(torch.from_numpy(x[:, None].copy()), torch.from_numpy(labels), 3)
        assert float(found) == pytest.approx(ross(x, labels), rel=1e-12, abs=1e-13)

    def test_of_two_discrete_variables_it_is_that_of_their_table(self):
        a = np.random.default_rng(0).integers(0, 4, 200)
        b = (a + np.random.default_rng(1).integers(0, 2, 200)) % 5
        a[0], b[1] = 99, 98
        found = contingency(torch.from_numpy(a), torch.from_numpy(b))
        assert float(found) == pytest.approx(table(a, b), rel=1e-12)
        # The same table, seen by the estimators for continuous variables.
        kept = slice(2, None)
        assert float(fast_ross(torch.from_numpy(a[kept, None] * 1.0), torch.from_numpy(b[kept]), 3)) == pytest.approx(
            table(a[kept], b[kept]), rel=0.02
        )

    def test_entropy_of_classes(self):
        # psi(6) - (3 psi(3) + 3 psi(3)) / 6 = 1/3 + 1/4 + 1/5
        assert float(class_entropy(torch.tensor([0, 0, 0, 1, 1, 1]))) == pytest.approx(1 / 3 + 1 / 4 + 1 / 5)
        assert float(class_entropy(torch.tensor([0, 0, 0, 1, 1, 1, 2]))) == pytest.approx(1 / 3 + 1 / 4 + 1 / 5)
        assert class_entropy(torch.arange(5)).isnan() and float(class_entropy(torch.zeros(5, dtype=int))) == 0

    def test_samples_alone_in_their_class_tell_nothing(self):
        assert fast_ross(torch.randn(6, 2).double(), torch.arange(6), 3).isnan().all()
