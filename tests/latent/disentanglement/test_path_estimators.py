"""Smoothness and monotonicity of hooked layers: the functions on paths in hand, however the rows of the paths come."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from tdprobe import registry
from tdprobe.errors import ConfigError
from tdprobe.latent import LayerScoring
from tdprobe.latent import disentanglement as d
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.scorer import Scorer
from tdprobe.stream.batch import Batch

NAMES = ("smoothness", "monotonicity")
BOTH = pytest.mark.parametrize("name", NAMES)
N, T = 9, 7


def data(n=N, t=T, f=4, m=2, seed=0):
    """Return latents ``(n, f, t)`` that move all the time, and attributes ``(n, m, t)``."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, f, t, generator=g, dtype=torch.float64).cumsum(-1)
    return z, z[:, :m] + torch.randn(n, m, t, generator=g, dtype=torch.float64)


def rows(z, a):
    """Lay paths out as rows, one path after the other: latents, attributes, numbers."""
    numbers = (torch.arange(len(z)) * 7 % len(z)).double()
    return z.mT.flatten(0, 1), a.mT.flatten(0, 1), numbers.repeat_interleave(z.shape[-1]).unsqueeze(1)


def one_shot(name, z, a, path, **options):
    td = TensorDict({"latents": z, "attributes": a, "path": path}, batch_size=z.shape[:-2])
    return registry.get(name)(**options)(td)[name]


def batch(z, a, path):
    return Batch({"x": z, "moved": 3 - 2 * z}, torch.arange(len(z)) * 7919, {"attributes": a, "path": path})


def streamed(estimator, whole, cuts):
    state = estimator.init(whole)
    for start, stop in zip([0, *cuts], [*cuts, whole.n], strict=True):
        state = estimator.update(state, whole.select(slice(start, stop)))
    return state


def expected(name, z, a, **options):
    """Return the function of the layer, and of the one that is turned round and stretched."""
    return torch.stack([getattr(d, name)(x, a, **options) for x in (z, 3 - 2 * z)])


class TestAgreesWithTheFunction:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("smoothness", {}),
            ("smoothness", {"reg_dim": [3, 1], "max_mode": "naive", "clamp": True}),
            ("smoothness", {"ptp_mode": 0.8, "p": 3.0}),
            ("monotonicity", {}),
            ("monotonicity", {"reg_dim": (2, 0), "liad_thresh": 0.5}),
            ("monotonicity", {"liad_thresh": 2.0, "degenerate_val": 0.0}),
        ],
    )
    def test_in_one_call(self, name, options):
        z, a = data()
        torch.testing.assert_close(one_shot(name, *rows(z, a), **options), getattr(d, name)(z, a, **options).float())

    @BOTH
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(0, N * T), max_size=9).map(sorted), st.booleans(), st.integers(0, 99))
    def test_in_any_batches_place_by_place_or_path_by_path(self, name, cuts, interleaved, seed):
        z, a = data(seed=seed)
        found = rows(z, a)
        if interleaved:
            found = [x.unflatten(0, (N, T)).transpose(0, 1).flatten(0, 1) for x in found]
        estimator = registry.get(name)()
        state = streamed(estimator, batch(*found), cuts)
        torch.testing.assert_close(estimator.score(state)["score"], expected(name, z, a), rtol=1e-10, atol=1e-12)
        assert int(state.n) == N * T

    @BOTH
    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(1, N - 1), min_size=1, max_size=4, unique=True).map(sorted), st.randoms())
    def test_merged_streams_of_whole_paths_in_any_order(self, name, cuts, order):
        z, a = data()
        x, y, path = rows(z, a)
        # Every stream numbers its paths anew.
        sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, N], strict=True)]
        numbers = torch.cat([torch.arange(float(size)) for size in sizes]).repeat_interleave(T).unsqueeze(1)
        whole, estimator, states = batch(x, y, numbers), registry.get(name)(), []
        for start, stop in zip([0, *cuts], [*cuts, N], strict=True):
            part = whole.select(slice(start * T, stop * T))
            states.append(streamed(estimator, part, [5]))
        while len(states) > 1:
            one, two = (states.pop(order.randrange(len(states))) for _ in range(2))
            states.append(one.merge(two))
        torch.testing.assert_close(estimator.score(states[0])["score"], expected(name, z, a), rtol=1e-10, atol=1e-12)
        # The merged stream goes on with paths of its own, whatever their numbers are.
        more = estimator.update(states[0], batch(x, y, path))
        torch.testing.assert_close(estimator.score(more)["score"], expected(name, z, a), rtol=1e-10, atol=1e-12)

    @BOTH
    def test_paths_of_different_lengths(self, name):
        lengths = (7, 2, 12, 3, 1)
        parts = [data(1, t, seed=t) for t in lengths]
        z, a = (torch.cat([part[i][0].mT for part in parts]) for i in (0, 1))
        path = torch.arange(5).repeat_interleave(torch.tensor(lengths))
        least = 3 if name == "smoothness" else 2
        known = torch.cat([getattr(d, name)(*part) for part in parts if part[0].shape[-1] >= least])
        mean = known.view(-1, 2).mean(0)
        torch.testing.assert_close(one_shot(name, z, a, path), mean.float())

    @BOTH
    def test_every_attribute_may_have_paths_of_its_own(self, name):
        # The functions take the path of unit i with attribute i; here each is a walk of one unit, the others stand.
        z, a = data(f=2)
        walks = [torch.where(torch.arange(2) == i, z.mT, 0.3).flatten(0, 1) for i in range(2)]
        noise = torch.randn(N * T, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        measured = [torch.cat([a[:, 0].reshape(-1, 1), noise], 1), torch.cat([noise, a[:, 1].reshape(-1, 1)], 1)]
        path = torch.arange(2 * N).repeat_interleave(T)
        found = one_shot(name, torch.cat(walks), torch.cat(measured), path)
        torch.testing.assert_close(found, getattr(d, name)(z, a).float())

    @BOTH
    def test_the_error_is_that_of_a_mean_over_paths(self, name):
        z, a = data()
        estimator = registry.get(name)()
        whole = batch(*rows(z, a))
        found = estimator.score(streamed(estimator, whole, []))["se"]
        every = getattr(d, name)(z, a, reduce_mode="none")
        torch.testing.assert_close(found[0], every.std(0) / N**0.5, rtol=1e-9, atol=1e-12)
        one = whole.select(slice(T))
        assert estimator.score(streamed(estimator, one, []))["se"].isnan().all()


class TestMemory:
    @BOTH
    def test_only_rows_of_paths_that_may_go_on_are_kept(self, name):
        z, a = data(200, 6)
        estimator, held = registry.get(name)(gap=24), []
        whole = batch(*rows(z, a))
        state = estimator.init(whole)
        for start in range(0, 1200, 31):
            state = estimator.update(state, whole.select(slice(start, start + 31)))
            held.append(state.at.numel())
        # Paths with a row among the last 24, the oldest of them whole.
        assert max(held) <= 24 + 6
        torch.testing.assert_close(estimator.score(state)["score"], expected(name, z, a), rtol=1e-10, atol=1e-12)

    def test_after_the_gap_a_number_is_free_again(self):
        z, a = data(3, 6)
        x, y, _ = rows(z, a)
        path = torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(6).unsqueeze(1)
        estimator = d.SmoothnessEstimator(gap=6)
        state = streamed(estimator, batch(x, y, path), [6, 12])
        torch.testing.assert_close(estimator.score(state)["score"], expected("smoothness", z, a))
        near = d.SmoothnessEstimator(gap=7)
        joined = torch.cat([z[[0]], z[[2]]], -1), torch.cat([a[[0]], a[[2]]], -1)
        two = torch.cat([d.smoothness(*joined, reduce_mode="none"), d.smoothness(z[[1]], a[[1]], reduce_mode="none")])
        found = near.score(streamed(near, batch(x, y, path), [6, 12]))["score"][0]
        torch.testing.assert_close(found, two.mean(0))

    @BOTH
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(1, N * T - 1), max_size=6).map(sorted), st.integers(1, 12), st.integers(0, 99))
    def test_batches_do_not_decide_where_a_path_is_over(self, name, cuts, gap, seed):
        z, a = data(seed=seed)
        x, y, _ = rows(z, a)
        path = torch.randint(4, (N * T, 1), generator=torch.Generator().manual_seed(seed))
        estimator, whole = registry.get(name)(gap=gap), batch(x, y, path.double())
        # Each stretch without such a gap, spelled out, has a number of its own.
        number, last, apart = {}, {}, []
        for place, key in enumerate(path.flatten().tolist()):
            number[key] = number[key] if place - last.get(key, -99) <= gap else len(apart)
            last[key] = place
            apart.append(float(number[key]))
        told = estimator.score(streamed(registry.get(name)(), batch(x, y, torch.tensor(apart).unsqueeze(1)), []))
        found = estimator.score(streamed(estimator, whole, cuts))
        torch.testing.assert_close(found["score"], told["score"], rtol=1e-10, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(found["se"], told["se"], rtol=1e-6, atol=1e-7, equal_nan=True)


class Sprites(nn.Module):
    """Paint a bump on a line: where it is, and how bright, are exact functions of two latents."""

    def __init__(self):
        super().__init__()
        self.latents, self.flipped, self.squashed = nn.Identity(), nn.Linear(2, 2, bias=False), nn.Tanh()
        self.flipped.weight.data = -torch.eye(2)

    def forward(self, z):
        z = self.latents(z)
        self.squashed(self.flipped(z))
        grid = torch.linspace(-12, 12, 97, dtype=z.dtype)
        return (z[:, 1:] - (grid - 4 * z[:, :1]).square() / 2).exp(), grid


def traversals(t=11, n=12, dtype=torch.float64):
    """Move each unit from -1 to 1 in turn, from n starting points."""
    starts = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=dtype) - 0.5
    z = starts.repeat_interleave(t, 0).repeat(2, 1)
    line = torch.linspace(-1, 1, t, dtype=dtype).repeat(n)
    z[: n * t, 0], z[n * t :, 1] = line, line
    return z, torch.arange(2 * n).repeat_interleave(t)


class TestGenerator:
    def scores(self, z, path, portion=17, **call):
        model = Sprites().to(z.dtype)
        images, grid = model(z)
        place, brightness = (images * grid).sum(1) / images.sum(1), images.sum(1)
        scoring = LayerScoring(
            "latents|flipped|squashed",
            [registry.get(name)(attributes=["place", "brightness"]) for name in NAMES],
            rows_per_update=portion,
            max_norm=None,
        )
        with scoring.prepare(model) as hooked:
            for part in torch.arange(len(z)).split(50):
                hooked(z[part], place=place[part], brightness=brightness[part], path=path[part])
        return hooked.scores(), place

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("portion", [8, 17, 4096])
    def test_known_answers_however_paths_are_cut(self, portion, dtype):
        z, path = traversals(dtype=dtype)
        table, place = self.scores(z, path, portion)
        smooth, monotone = (table.block(name) for name in NAMES)
        assert smooth.layers_b == ("place", "brightness") and smooth.route == "sums over paths"
        # The place is linear in its unit; bends of an exponential are powers of the factor per step.
        bends = torch.exp(0.2 * torch.arange(9.0, dtype=torch.float64))
        curve = float(1 - bends.square().sum() / bends.sum() ** 2)
        assert smooth.values[0].tolist() == pytest.approx([1, curve], abs=1e-9 if dtype == torch.float64 else 1e-4)
        assert smooth.values[1].tolist() == pytest.approx(smooth.values[0].tolist(), abs=1e-4)
        assert monotone.values.tolist() == [[1, 1], [-1, -1], [-1, -1]]
        # A squashed unit moves in unequal steps, and the place bends over it.
        half = len(z) // 2
        paths = [x.view(12, 11) for x in ((-z[:half, 0]).tanh(), place[:half])]
        assert smooth.values[2, 0] == pytest.approx(float(d.smoothness(*paths)), abs=1e-5)
        assert smooth.values[2, 0] < 0.95 and table.block("smoothness").se[2, 0] < 1e-4

    def test_a_unit_that_does_not_drive_its_attribute(self):
        z, path = traversals()
        model = Sprites().double()
        images, _ = model(z)
        estimator = d.MonotonicityEstimator(reg_dim=[1])
        with LayerScoring("latents", [estimator], max_norm=None).prepare(model) as hooked:
            hooked(z, attributes=(images.argmax(1) - 48).sign(), path=path)
        with pytest.warns(UserWarning, match="'attributes' is NaN in some layer, for on no path of 2 rows or more"):
            assert math.isnan(hooked.scores().block("monotonicity").values[0, 0])

    def test_tokens_are_places_too(self, tiny_llama):
        ids = torch.randint(1, 60, (6, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        mask[4] = 0
        size = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
        layer, rest = r"model\.layers\.1$", {"skip_first": 0, "max_norm": None, "rows_per_update": 8}
        cached = []
        hook = tiny_llama.model.layers[1].register_forward_hook(lambda *args: cached.append(args[2]))
        with torch.no_grad(), LayerScoring(layer, [*NAMES], **rest).prepare(tiny_llama) as hooked:
            for part in (slice(0, 4), slice(4, 6)):
                numbers = torch.arange(6)[part]
                hooked(input_ids=ids[part], attention_mask=mask[part], attributes=size[part], path=numbers)
        hook.remove()
        z = torch.cat([x[0] if isinstance(x, tuple) else x for x in cached])[..., 0]
        kept = [mask[i].bool() for i in (0, 1, 2, 3, 5)]
        paths = [(z[i][on][None], size[i][on][None]) for i, on in zip((0, 1, 2, 3, 5), kept, strict=True)]
        for name in NAMES:
            known = torch.stack([getattr(d, name)(*path)[0] for path in paths]).mean()
            assert hooked.scores().block(name).values[0, 0] == pytest.approx(float(known), abs=1e-6)


class TestDegenerate:
    @BOTH
    def test_a_path_on_which_the_unit_stands_still_somewhere_does_not_count(self, name):
        z, a = data()
        z[2, 1, 4] = z[2, 1, 3]
        found = one_shot(name, *rows(z, a))
        kept = [i for i in range(N) if i != 2]
        assert found[0] == pytest.approx(float(getattr(d, name)(z[:, :1], a[:, :1])), rel=1e-6)
        assert found[1] == pytest.approx(float(getattr(d, name)(z[kept, 1:2], a[kept, 1:])), rel=1e-6)

    @BOTH
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_half_precision_is_computed_in_more(self, name, dtype):
        z, a = (x.to(dtype) for x in data(t=5))
        z[..., 1:] += (z.diff(dim=-1) == 0).to(dtype)  # rounding may have made it stand still
        found, known = (one_shot(name, *rows(x, y)[:2], rows(x, y)[2]) for x, y in ((z, a), (z.double(), a.double())))
        torch.testing.assert_close(found, known)

    def test_a_line_in_half_precision_is_straight(self):
        z = torch.linspace(-1, 1, 11).bfloat16().unsqueeze(1)
        assert one_shot("smoothness", z, 3 * z + 1, torch.zeros(11)).tolist() == [1]

    @BOTH
    def test_layers_that_are_not_finite_are_nan_and_named(self, name):
        x, y, path = rows(*data())
        bad = x.clone()
        bad[7, 3] = torch.inf  # no unit of an attribute, and the layer is not to be trusted all the same
        scorer = Scorer(resolve_estimators([name]), max_norm=None)
        scorer.push(Batch({"good": x, "bad": bad}, torch.arange(N * T), {"attributes": y, "path": path}))
        with pytest.warns(UserWarning, match="'bad' held NaN or infinite values"):
            found = scorer.scores()[name]
        assert found[0].isfinite().all() and found[1].isnan().all()

    @BOTH
    def test_constant_attributes_are_straight_and_go_nowhere(self, name):
        x, y, path = rows(*data())
        y[:, 1] = 2
        if name == "smoothness":
            assert one_shot(name, x, y, path)[1] == 1
            return
        assert one_shot(name, x, y, path, degenerate_val=0.5)[1] == 0.5
        with pytest.warns(UserWarning, match=r"monotonicity: 'attributes\[1\]' is NaN"):
            assert one_shot(name, x, y, path)[1].isnan()

    @BOTH
    def test_one_attribute_and_no_rows(self, name):
        z, a = data()
        x, y, path = rows(z, a)
        assert one_shot(name, x, y[:, 0], path[:, 0]).shape == (1,)
        with pytest.warns(UserWarning, match="is NaN in some layer"):
            assert one_shot(name, x[:0], y[:0], path[:0]).isnan().all()

    @BOTH
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda x, y, p: (x, torch.where(y > 1e9, y, torch.nan), p),
                "63 values of attribute 0, 63",
            ),
            (lambda x, y, p: (x, y, p * torch.nan), "or to NaN; give one number for each row"),
            (lambda x, y, p: (x, y, p.repeat(1, 2)), "to several"),
            (
                lambda x, y, p: (x[:, :1], y, p),
                r"layer 0 has 1 units, .* 2 attributes with the units \[0, 1\]",
            ),
            (
                lambda x, y, p: (x.expand(2, -1, -1), y.expand(2, -1, -1), torch.stack([p, p + 1])),
                "different paths in different data sets",
            ),
        ],
    )
    def test_what_is_refused(self, name, change, message):
        with pytest.raises(ConfigError, match=message):
            one_shot(name, *change(*rows(*data())))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: d.SmoothnessEstimator(reg_dim=[1, 1]), r"reg_dim=\[1, 1\]"),
            (lambda: d.SmoothnessEstimator(reg_dim=[-1]), r"reg_dim=\[-1\]"),
            (lambda: d.SmoothnessEstimator(reg_dim="best"), "reg_dim='best'"),
            (lambda: d.SmoothnessEstimator(reg_dim=0), "reg_dim=0"),
            (lambda: d.SmoothnessEstimator(reg_dim=torch.zeros(0, dtype=torch.int64)), "reg_dim=tensor"),
            (lambda: d.smoothness(*data(), reg_dim=0), r"reg_dim has shape \(\)"),
            (lambda: d.SmoothnessEstimator(p=1), "p=1"),
            (lambda: d.SmoothnessEstimator(max_mode="lemer"), "did you mean 'lehmer'"),
            (lambda: d.SmoothnessEstimator(ptp_mode=2), "ptp_mode=2"),
            (lambda: d.MonotonicityEstimator(liad_thresh=-1), "liad_thresh=-1"),
            (lambda: d.MonotonicityEstimator(gap=0), "gap=0"),
            (
                lambda: one_shot("smoothness", *rows(*data()), reg_dim=[0]),
                r"2 attributes with the units \[0\]",
            ),
        ],
    )
    def test_arguments(self, make, message):
        with pytest.raises(ConfigError, match=message):
            make()

    def test_states_of_other_layers_do_not_merge(self):
        estimator, found = d.SmoothnessEstimator(), batch(*rows(*data()))
        one = streamed(estimator, found, [])
        two = streamed(estimator, Batch({"x": found.rows["x"]}, found.ids, found.targets), [])
        with pytest.raises(ConfigError, match="cannot merge paths of"):
            one.merge(two)

    def test_shows_its_arguments(self):
        assert repr(d.MonotonicityEstimator("z", ["size"])).startswith(
            "MonotonicityEstimator(in_key='z', attributes=['size'], path_key='path', out_key='monotonicity', "
        )
