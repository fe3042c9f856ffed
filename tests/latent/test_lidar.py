"""LiDAR: closed forms, the paper's formulas in numpy, groups in any order and any batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from spectral_tools import changes, renyi
from tdprobe import registry
from tdprobe.latent import LayerScoring, LidarEstimator
from tdprobe.stats import GroupMoments
from tdprobe.stream.batch import Batch


def samples(m=20, q=4, d=6, seed=0):
    """Return m samples of q views each, ``(m * q, d)`` float64, the views of a sample together."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(m, 1, d, generator=g, dtype=torch.float64) * torch.arange(1.0, d + 1)
    return (centres + 0.5 * torch.randn(m, q, d, generator=g, dtype=torch.float64)).flatten(0, 1) + 2


def reference(x, groups, delta=1e-4):
    """Whiten by the inverse root of the covariance within, as in the paper."""
    x, groups = x.double().numpy(), np.asarray(groups)
    several = [g for g in np.unique(groups) if (groups == g).sum() > 1]
    x, groups = x[np.isin(groups, several)], groups[np.isin(groups, several)]
    within = sum(np.atleast_2d(np.cov(x[groups == g].T, bias=True)) * (groups == g).sum() for g in several) / len(x)
    means = np.stack([x[groups == g].mean(0) for g in groups])
    between = np.atleast_2d(np.cov(means.T, bias=True))
    d = x.shape[1]
    values, vectors = np.linalg.eigh(within + delta * np.trace(within) / d * np.eye(d))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return np.exp(renyi(np.linalg.eigvalsh(root @ between @ root), 1))


def lidar(x, views=2, **options):
    numbers = (torch.arange(x.shape[-2]) // views).expand(x.shape[:-1])
    return LidarEstimator(**options)(TensorDict({"data": x, "sample": numbers}, batch_size=x.shape[:-2]))["lidar"]


def exact(x, views=4, **options):
    return streamed(LidarEstimator(**options), x, torch.arange(len(x)) // views, [len(x)])


def streamed(estimator, x, numbers, sizes, merge=False):
    states = []
    for part, number in zip(x.split(sizes), numbers.split(sizes), strict=True):
        batch = Batch({"x": part}, torch.arange(len(part)), {"sample": number.double().unsqueeze(1)})
        state = estimator.init(batch) if merge or not states else states.pop()
        states.append(estimator.update(state, batch))
    state = states[-1]
    for other in states[:-1]:
        state = state.merge(other)
    return estimator.score(state)["score"].item()


class TestValue:
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_samples_along_k_axes(self, k):
        # Views differ alike in all 5 directions, samples in k of them.
        centres = 7 * torch.cat([torch.eye(5)[:k], -torch.eye(5)[:k]])
        steps = torch.cat([torch.eye(5), -torch.eye(5)])
        x = (centres.unsqueeze(1) + 0.1 * steps).flatten(0, 1) + 3
        assert lidar(x, views=10).item() == pytest.approx(k, rel=1e-5)

    def test_two_axes_by_hand(self):
        # Variances between 4 and 1 over those within 1 and 1: shares 0.8 and 0.2.
        centres = torch.tensor([[2.0, 1], [2, -1], [-2, 1], [-2, -1]])
        steps = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        x = (centres.unsqueeze(1) + steps).flatten(0, 1)
        expected = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
        assert lidar(x, views=4).item() == pytest.approx(expected, rel=1e-6)
        # The ridge of 1 doubles both variances within, which changes no share.
        assert lidar(x, views=4, delta=1.0).item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(("m", "q", "d"), [(2, 2, 1), (20, 4, 6), (7, 3, 30), (100, 2, 10)])
    @pytest.mark.parametrize("delta", [1e-4, 0.5])
    def test_the_definition(self, m, q, d, delta):
        x = samples(m, q, d)
        found = exact(x, q, delta=delta)
        assert found == pytest.approx(reference(x, torch.arange(m * q) // q, delta), rel=1e-7)

    def test_float32_holds_at_an_offset(self):
        x = samples(50) + 1000
        assert lidar(x.float(), views=4).item() == pytest.approx(reference(x, torch.arange(200) // 4), rel=1e-4)
        half = samples().half()
        assert lidar(half, views=4).item() == pytest.approx(reference(half, torch.arange(80) // 4), rel=1e-5)


class TestStreams:
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, 15), min_size=1, max_size=6), st.booleans(), st.integers(0, 99))
    def test_any_order_batches_and_merge(self, sizes, merge, seed):
        sizes = [*sizes, 80 - sum(sizes)] if sum(sizes) < 80 else [80]
        x, order = samples(), torch.randperm(80, generator=torch.Generator().manual_seed(seed))
        found = streamed(LidarEstimator(), x[order], order // 4, sizes, merge)
        assert found == pytest.approx(reference(x, torch.arange(80) // 4), rel=1e-8)

    def test_groups_of_any_size_and_single_rows_do_not_count(self):
        x = samples()
        kept = torch.tensor([0, 1, 4, 5, 6, 7, 9, 13, 14, 15, 16, 19, 33, 34, 35, 50])
        found = streamed(LidarEstimator(), x[kept], kept // 4, [5, 11])
        assert found == pytest.approx(reference(x[kept], kept // 4), rel=1e-8)

    def test_the_state_is_bounded(self):
        statistic, ids = GroupMoments(limit=3), torch.arange(6)
        x, numbers = samples(4, 2), torch.arange(8.0).unsqueeze(1) // 2
        state = statistic.update(statistic.init([x, numbers], ids), [x[:6], numbers[:6]], ids)
        with pytest.raises(ValueError, match=r"more than 3 groups.*same number"):
            statistic.update(state, [x[6:], numbers[6:]], ids[:2])
        assert int(state.n) == 6 and state.groups.tolist() == [0, 1, 2] and state.counts.tolist() == [2, 2, 2]

    def test_samples_come_with_each_call(self):
        model, x = torch.nn.Sequential(torch.nn.Identity()), samples()
        with LayerScoring("0", estimators=["lidar"], rows_per_update=16, max_norm=None).prepare(model) as hooked:
            for part in torch.arange(80).split(30):
                hooked(x[part], sample=part // 4)
        table = hooked.hooking_context.scores()
        assert table.block("lidar").values.item() == pytest.approx(exact(x), rel=1e-9)
        assert table.block("lidar").layers_b == ("sample",)

    def test_leading_dimensions_are_data_sets(self):
        x = torch.stack([samples(seed=seed) for seed in range(6)]).unflatten(0, (2, 3))
        found = lidar(x, views=4)
        assert found.shape == (2, 3) and found[1, 2].item() == pytest.approx(lidar(x[1, 2], views=4).item(), rel=1e-6)
        assert lidar(x[:0], views=4).shape == (0, 3)


class TestDegenerate:
    def test_without_samples_that_have_two_views(self):
        with pytest.raises(ValueError, match=r"got 1 samples with 2 views or more among 3 rows; .*under 'sample'"):
            lidar(torch.randn(3, 4))
        grouped = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
        with pytest.raises(ValueError, match="grouped differently"):
            LidarEstimator()(TensorDict({"data": torch.randn(2, 4, 3), "sample": grouped}, batch_size=[2]))
        with pytest.raises(ValueError, match="by NaN"):
            LidarEstimator()(TensorDict({"data": torch.randn(4, 3), "sample": torch.full((4,), math.nan)}))

    def test_layers_that_do_not_vary(self):
        assert lidar(torch.ones(8, 3)).isnan() and lidar(torch.zeros(8, 0)).isnan()
        assert lidar(torch.randn(4, 3).repeat_interleave(2, 0)).isnan()
        assert lidar(torch.tensor([[1.0], [-1.0]]).repeat(4, 1)).isnan()
        wide = samples(4, 2, 30)
        assert lidar(wide, delta=0.0).isnan() and lidar(wide).isfinite()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nan_in_nan_out(self, bad):
        x = torch.stack([samples(), samples(seed=1)])
        x[1, 5, 2] = bad
        with pytest.warns(UserWarning, match="'data' held NaN or infinite values") as caught:
            found = lidar(x, views=4)
        assert len(caught) == 1 and found.isnan().tolist() == [False, True]

    def test_arguments(self):
        with pytest.raises(ValueError, match="delta=-1"):
            LidarEstimator(delta=-1)
        assert registry.get("lidar") is LidarEstimator
        shown = "LidarEstimator(in_key='data', sample_key='view', out_key='lidar', delta=0.0001)"
        assert repr(LidarEstimator(sample_key="view")) == shown


class TestInvariance:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10**6))
    def test_declared_ones_hold_and_others_do_not(self, seed):
        x = samples()
        plain = exact(x, delta=0.1)
        bare = exact(x, delta=0.0)
        for name, changed in changes(x, seed).items():
            found = exact(changed, delta=0.1)
            assert (found == pytest.approx(plain, rel=1e-7)) == (name in LidarEstimator.spec.invariant_to), name
            # Without a ridge nothing but the order of views and samples is left.
            assert exact(changed, delta=0.0) == pytest.approx(bare, rel=1e-6)
        assert 1 <= plain <= 6
