"""MIG, DMIG, DLIG, XMIG: against their definitions, where they differ from latte on purpose, and what they refuse."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from disentanglement_tools import kraskov, ross, sklearn_gaps, table
from tdprobe.errors import ConfigError
from tdprobe.latent import disentanglement as d

FUNCTIONS = ("mig", "dmig", "dlig", "xmig")


def mixed(n=150, f=5, m=3, seed=0):
    """Latents, and attributes that depend on several of them and on each other."""
    g = np.random.default_rng(seed)
    z = g.normal(size=(n, f))
    return z, 2 * z[:, :m] + z[:, :m] @ g.normal(size=(m, m)) + 0.3 * g.normal(size=(n, m))


class TestSameValues:
    @pytest.mark.parametrize("reg_dim", [None, [4, 0, 2], [0, 1, 2]])
    @pytest.mark.parametrize("seed", range(3))
    def test_continuous_attributes(self, seed, reg_dim):
        z, a = mixed(seed=seed)
        expected = sklearn_gaps(z, a, reg_dim)
        for name in FUNCTIONS:
            found = getattr(d, name)(z, a, reg_dim)
            np.testing.assert_allclose(found, expected[name], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(d.mig(z, a, reg_dim, fill_reg_dim=True), expected["filled"], rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("reg_dim", [None, [4, 0, 2]])
    def test_discrete_attributes_against_latents(self, reg_dim):
        z, a = mixed(200)
        labels = (a > 0).astype(int) + (a > 1)
        expected = sklearn_gaps(z, labels, reg_dim, discrete=True)
        for name in ("mig", "xmig"):
            found = getattr(d, name)(z, labels, reg_dim, discrete=True)
            np.testing.assert_allclose(found, expected[name], rtol=1e-12, atol=1e-13)

    def test_the_bundle_is_the_four(self):
        z, a = mixed()
        found = d.dependency_aware(z, a, [3, 1, 0])
        assert list(found) == list(FUNCTIONS)
        for name in FUNCTIONS:
            np.testing.assert_allclose(found[name], getattr(d, name)(z, a, [3, 1, 0]), rtol=1e-12)
        np.testing.assert_allclose(d.dependency_aware(z, a)["mig"], d.mig(z, a, fill_reg_dim=True), rtol=1e-12)

    def test_the_bundle_works_the_matrix_out_once(self, monkeypatch):
        from tdprobe.latent.disentanglement.information import Information

        counts, latent = [], Information.latent
        monkeypatch.setattr(Information, "latent", lambda self, z: counts.append(z.shape) or latent(self, z))
        d.dependency_aware(*mixed())
        assert counts == [(150, 5)]

    def test_gaps_by_hand(self):
        # Mutual information replaced by known numbers: 3 latents, 2 attributes.
        from tdprobe.latent.disentanglement.gaps import Gaps

        class Known:
            entropy = torch.tensor([2.0, 4.0], dtype=torch.float64)

            def between(self, pairs):
                return torch.full((2, 2), 1.0, dtype=torch.float64)

        matrix = torch.tensor([[0.9, 0.2], [0.4, 0.3], [0.1, 0.8]], dtype=torch.float64)
        assert Gaps(Known(), matrix, None, True).mig().tolist() == pytest.approx([0.5 / 2, 0.5 / 4])
        own = Gaps(Known(), matrix, (0, 1), True)
        assert own.mig().tolist() == pytest.approx([0.5 / 2, -0.5 / 4])
        # Latent 1 belongs to attribute 1, latent 2 to none.
        assert own.dmig().tolist() == pytest.approx([0.5 / (2 - 1), -0.5 / 4])
        assert own.dlig().tolist() == pytest.approx([0.7 / (2 - 1), -0.1 / (4 - 1)])
        assert own.xmig().tolist() == pytest.approx([0.8 / 2, -0.5 / 4])
        assert Gaps(Known(), matrix, (0, 1), False).xmig().tolist() == pytest.approx([0.8, -0.5])


class TestKinds:
    def test_numpy_in_numpy_out_torch_in_torch_out(self):
        z, a = mixed()
        for name in FUNCTIONS:
            ours, theirs = getattr(d, name)(z, a), getattr(d, name)(torch.tensor(z), torch.tensor(a))
            assert isinstance(ours, np.ndarray) and ours.dtype == np.float64 and ours.shape == (3,)
            assert isinstance(theirs, torch.Tensor) and theirs.dtype == torch.float64
            np.testing.assert_array_equal(ours, theirs.numpy())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
    def test_other_dtypes_count_as_float64(self, dtype):
        z, a = (torch.tensor(10 * x).to(dtype) for x in mixed(80))
        assert torch.equal(d.mig(z, a), d.mig(z.double(), a.double()))

    def test_gradients_autocast_and_inference_mode_stay_outside(self):
        z, a = (torch.tensor(x) for x in mixed(60))
        plain = d.dmig(z, a)
        assert torch.equal(d.dmig(z.clone().requires_grad_(), a), plain) and not plain.requires_grad
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(d.dmig(z, a), plain)

    def test_the_inputs_stay_as_they_are(self):
        z, a = mixed(60)
        labels = np.where(a > 0, 7, 3)
        before = z.copy(), labels.copy()
        d.dependency_aware(z, labels, discrete=True)
        np.testing.assert_array_equal(z, before[0])
        np.testing.assert_array_equal(labels, before[1])

    def test_lists_frames_columns_and_read_only_arrays(self):
        z, a = mixed(60)
        plain = d.mig(z, a[:, 0])
        np.testing.assert_array_equal(d.mig(z.tolist(), a[:, 0].tolist()), plain)
        pd = pytest.importorskip("pandas")
        np.testing.assert_array_equal(d.mig(pd.DataFrame(z), pd.Series(a[:, 0])), plain)
        z.flags.writeable = False
        np.testing.assert_array_equal(d.mig(z[:, ::-1][:, ::-1], a[:, :1]), plain)

    @pytest.mark.parametrize("reg_dim", [(4, 0, 2), np.array([4, 0, 2]), torch.tensor([4, 0, 2]), {4: 1, 0: 1, 2: 1}])
    def test_any_sequence_is_a_reg_dim(self, reg_dim):
        z, a = mixed(60)
        np.testing.assert_array_equal(d.dmig(z, a, reg_dim), d.dmig(z, a, [4, 0, 2]))
        np.testing.assert_array_equal(d.xmig(z, a[:, :2], range(1, 3)), d.xmig(z, a[:, :2], [1, 2]))


class TestOnPurpose:
    """The rows of the table of differences to latte."""

    def test_two_discrete_attributes_meet_in_their_table(self):
        z, a = mixed(200)
        labels = (a > 0).astype(int) + (a > 1)
        found = d.dlig(z, labels, discrete=True)
        mi = np.array([[ross(z[:, i], labels[:, j]) for j in range(3)] for i in range(3)])
        for i in range(3):
            j = max((j for j in range(3) if j != i), key=lambda j: mi[i, j])
            left = table(labels[:, i], labels[:, i]) - table(labels[:, i], labels[:, j])
            assert found[i] == pytest.approx((mi[i, i] - mi[i, j]) / left, rel=1e-10)

    def test_attributes_of_both_kinds(self):
        z, a = mixed(120, m=2)
        labels = np.stack([a[:, 0], a[:, 1] > 0.5], 1)
        found = d.dlig(z, labels, discrete=[False, True])
        mi = np.array([[kraskov(z[:, i], labels[:, 0]), ross(z[:, i], labels[:, 1])] for i in range(2)])
        shared = ross(labels[:, 0], labels[:, 1])
        entropy = kraskov(labels[:, 0], labels[:, 0]), table(labels[:, 1], labels[:, 1])
        expected = [(mi[0, 0] - mi[0, 1]) / (entropy[0] - shared), (mi[1, 1] - mi[1, 0]) / (entropy[1] - shared)]
        np.testing.assert_allclose(found, expected, rtol=1e-10)

    @pytest.mark.parametrize("discrete", [False, True])
    def test_ties_are_counted_and_not_broken(self, discrete):
        g = np.random.default_rng(0)
        z = g.normal(size=(150, 4)).clip(0)
        a = (3 * z[:, :2] + g.normal(size=(150, 2))).round()
        order = g.permutation(150)
        for name in FUNCTIONS:
            found = getattr(d, name)(z, a, discrete=discrete)
            np.testing.assert_allclose(found, getattr(d, name)(z[order], a[order], discrete=discrete), rtol=1e-10)
            np.testing.assert_array_equal(found, getattr(d, name)(z, a, discrete=discrete))
        if not discrete:
            gap = np.sort([kraskov(z[:, i], a[:, 0]) for i in range(4)])[-2:]
            assert d.mig(z, a)[0] == pytest.approx((gap[1] - gap[0]) / kraskov(a[:, 0], a[:, 0]), rel=1e-10)

    @pytest.mark.parametrize("discrete", [False, True])
    def test_no_entropy_is_nan_with_one_warning_that_names_the_attribute(self, discrete):
        z, a = mixed(100)
        a = (a > 0).astype(float) if discrete else a
        a[:, 1] = 4
        with pytest.warns(UserWarning, match="attribute 1: the score is NaN") as caught:
            found = d.mig(z, a, discrete=discrete)
        assert len(caught) == 1
        assert np.isnan(found).tolist() == [False, True, False]
        assert found[[0, 2]].tolist() == d.mig(z, a[:, [0, 2]], discrete=discrete).tolist()

    @pytest.mark.parametrize("discrete", [False, True])
    @pytest.mark.parametrize("factor", [1, 3, -0.1])
    def test_no_entropy_left_by_another_attribute(self, discrete, factor):
        z, a = mixed(100, m=2)
        a = (a > 0) * 10 if discrete else a
        a[:, 1] = factor * a[:, 0]
        with pytest.warns(UserWarning, match="attribute 0, attribute 1: the score is NaN") as caught:
            found = d.dlig(z, a, discrete=discrete)
        assert len(caught) == 1 and np.isnan(found).all()
        with pytest.warns(UserWarning) as caught:
            bundle = d.dependency_aware(z, a, discrete=discrete)
        assert len(caught) == 1 and np.isfinite(bundle["mig"]).all()

    def test_without_normalizer_there_is_always_a_gap(self):
        z, a = mixed(100)
        a[:, 1] = 4
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert d.mig(z, a, normalizer="none")[1] == 0

    def test_scores_depend_on_n_with_the_compatible_normalizer_only(self):
        found = {}
        for n in (200, 800, 3200):
            z = np.random.default_rng(n).normal(size=(n, 2))
            a = z[:, 0] + 0.3 * np.random.default_rng(n + 1).normal(size=n)
            for normalizer in ("ksg", "binned", "none"):
                found.setdefault(normalizer, []).append(float(d.mig(z, a, normalizer=normalizer)[0]))
        ksg, binned, gap = np.array(found["ksg"]), np.array(found["binned"]), np.array(found["none"])
        assert (ksg[:-1] > 1.15 * ksg[1:]).all()
        # I(z, a) of this channel is log(1 + 1 / 0.09) / 2 nats.
        assert gap == pytest.approx(np.log(1 + 1 / 0.09) / 2, abs=0.12)
        assert binned.std() < 0.03 and ((binned > 0) & (binned < 1)).all()

    def test_bins_make_a_score_of_one_reachable_and_not_more(self):
        z, _ = mixed(2000)
        assert d.mig(z, z[:, 0], normalizer="binned")[0] == pytest.approx(1, abs=0.05)
        cut = np.argsort(np.argsort(z[:, 0])) * 20 // 2000
        found = d.mig(z, z[:, 0], normalizer="binned")
        np.testing.assert_allclose(found, d.mig(z, cut, discrete=True), rtol=1e-12)
        # Equal values stay in one bin.
        np.testing.assert_allclose(
            d.mig(z, z[:, 0] > 0, normalizer="binned"), d.mig(z, z[:, 0] > 0, discrete=True), rtol=1e-12
        )


class TestDegenerate:
    def test_repeated_rows_are_a_small_table(self):
        z, a = mixed(30)
        found = d.mig(np.repeat(z, 8, 0), np.repeat(a, 8, 0))
        assert found.tolist() == pytest.approx([0, 0, 0], abs=1e-12)  # every latent tells the rows apart

    def test_constant_latents_know_nothing(self):
        z, a = mixed(100)
        z[:, 1:] = 3
        mi = d.mutual_information(z, a)
        assert (mi[1:] == 0).all() and mi[0, 0] > 0.3
        assert d.mig(z, a[:, 0])[0] == pytest.approx(mi[0, 0] / kraskov(a[:, 0], a[:, 0]))

    def test_one_attribute(self):
        z, a = mixed(100)
        found = [getattr(d, name)(z, a[:, 0]) for name in ("mig", "dmig", "xmig")]
        assert [x.shape for x in found] == [(1,)] * 3 and found[1] == found[2] == d.mig(z, a[:, :1], [0])

    def test_fewest_samples(self):
        z, a = mixed(5)
        assert np.isfinite(d.mig(z, a)).all()
        # Of four samples each is among the nearest of all others, whatever the attribute is.
        with pytest.warns(UserWarning, match="no entropy is left to divide by"):
            assert np.isnan(d.mig(z[:4], a[:4])).all()
        with pytest.raises(ConfigError, match="got 3 samples.*at least 4"):
            d.mig(z[:3], a[:3])

    def test_every_sample_its_own_class(self):
        z, _ = mixed(20)
        with pytest.warns(UserWarning, match="attribute 0: the score is NaN"):
            assert np.isnan(d.mig(z, np.arange(20), discrete=True)[0])

    def test_extreme_scales(self):
        z, a = mixed(80)
        scale = np.array([1e-150, 1e150, 1, 1e-30, 1e30])
        np.testing.assert_allclose(d.mig(z * scale, a * 1e-120), d.mig(z, a), rtol=1e-9)


Z, A = mixed(20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Z[:, 0], A), r"z has shape \(20,\)"),
        ((Z[None], A), r"z has shape \(1, 20, 5\)"),
        ((Z, A[None]), r"a has shape \(1, 20, 3\)"),
        ((Z, 3.0), r"a has shape \(\)"),
        ((Z, A[:-1]), "z has 20 samples and a has 19"),
        ((Z[:, :2], A), "z has 2 features and a has 3 attributes; needed are 3 features"),
        ((Z[:, :1], A[:, :1]), "needed are 2 features"),
        ((Z, A[:, :0]), "a has 0 attributes"),
        ((Z, A, [0, 1]), r"reg_dim has shape \(2,\); allowed are 3 different integers from 0 to 4"),
        ((Z, A, [[0, 1, 2]]), r"reg_dim has shape \(1, 3\)"),
        ((Z, A, [0, 1, -1]), r"reg_dim is \[0, 1, -1\]"),
        ((Z, A, [0, 1, 5]), r"reg_dim is \[0, 1, 5\]"),
        ((Z, A, [0, 1, 1]), r"reg_dim is \[0, 1, 1\]"),
        ((Z, A, [0.0, 1.0, 2.0]), "reg_dim holds"),
        ((Z, A, None, True), "attribute 0 holds .*integer labels"),
        ((Z, A, None, [True, False]), "one bool for each of 3 attributes"),
        ((Z, A, None, "yes"), "got discrete='yes'"),
        ((np.where(Z > 2, np.nan, Z), A), "z holds NaN or infinite values in columns"),
        ((Z, np.where(np.arange(3) == 1, np.inf, A)), r"a holds NaN or infinite values in columns \[1\]"),
        ((Z + 1j, A), "z is complex"),
        ((Z, np.full((20, 3), "x")), "a is a ndarray that is no array of numbers"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        d.mig(*arguments)


def test_what_single_functions_refuse():
    with pytest.raises(ConfigError, match="a has 1 attributes; needed are 2"):
        d.dlig(Z, A[:, 0])
    for function in (d.xmig, d.dependency_aware):
        with pytest.raises(ConfigError, match="z has 3 features and a has 3 attributes.*needs 4 features"):
            function(Z[:, :3], A)
    with pytest.raises(ConfigError, match="unknown normalizer 'bined'; did you mean 'binned'"):
        d.mig(Z, A, normalizer="bined")
    assert d.mutual_information(Z[:, :1], A).shape == (1, 3)
