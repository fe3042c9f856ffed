"""Curvature of trajectories: angles known in advance, a plain loop, masks, and a language model."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from tdprobe import registry
from tdprobe.latent import ActivationCaching, CurvatureEstimator, LayerScoring, trajectory_curvature
from tdprobe.stats import Turns
from tdprobe.stream.batch import Batch


def by_loop(x):
    """Return the mean angle token by token."""
    steps = np.diff(x.double().numpy(), axis=0)
    steps = [step / np.linalg.norm(step) for step in steps]
    return np.mean([np.arccos(np.clip(u @ v, -1, 1)) for u, v in pairwise(steps)])


def paths(b=3, t=12, d=5, seed=0):
    return torch.randn(b, t, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestValue:
    @pytest.mark.parametrize("sides", [3, 4, 12, 1000])
    def test_a_regular_polygon_turns_by_its_outer_angle(self, sides):
        turns = 2 * torch.pi * torch.arange(sides + 5, dtype=torch.float64) / sides
        angle, count = trajectory_curvature(torch.stack([turns.cos(), turns.sin()], -1))
        assert float(angle) == pytest.approx(2 * math.pi / sides, rel=1e-9) and int(count) == sides + 3

    def test_straight_and_back(self):
        line = torch.tensor([0.0, 1, 5, 7, 7.5]).unsqueeze(1) * torch.tensor([0.3, -1.1, 0.7])
        assert float(trajectory_curvature(line)[0]) == pytest.approx(0, abs=1e-6)
        assert float(trajectory_curvature(line[[0, 2, 1, 3, 0]])[0]) == pytest.approx(math.pi, abs=1e-6)

    def test_tiny_angles_keep_their_digits(self):
        # In arccos a cosine of 1 - 1e-20 / 2 is 1.
        bent = torch.tensor([[0.0, 0], [1, 0], [2, 1e-10]], dtype=torch.float64)
        assert float(trajectory_curvature(bent)[0]) == pytest.approx(1e-10, rel=1e-9)

    def test_independent_tokens_and_independent_steps(self):
        x = paths(20, 100, 400)
        assert trajectory_curvature(x)[0].mean().item() == pytest.approx(2 * math.pi / 3, abs=0.01)
        assert trajectory_curvature(x.cumsum(1))[0].mean().item() == pytest.approx(math.pi / 2, abs=0.01)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_a_plain_loop(self, dtype):
        x = paths().to(dtype)
        angle, count = trajectory_curvature(x)
        assert angle.dtype == torch.float64 and angle.shape == count.shape == (3,)
        assert angle.tolist() == pytest.approx([by_loop(one) for one in x], rel=1e-9) and count.tolist() == [10] * 3


class TestMask:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.booleans(), min_size=12, max_size=12))
    def test_the_path_goes_from_one_token_that_counts_to_the_next(self, kept):
        x, mask = paths(1), torch.tensor([kept])
        garbage = torch.where(mask.unsqueeze(-1), x, torch.nan)
        angle, count = trajectory_curvature(garbage, mask)
        assert int(count) == max(0, sum(kept) - 2)
        if sum(kept) > 2:
            assert angle.item() == pytest.approx(by_loop(x[mask]), rel=1e-9)
        else:
            assert angle.isnan()

    def test_padding_on_either_side_and_masks_of_numbers(self):
        x, pad = paths(), torch.full((3, 4, 5), math.inf, dtype=torch.float64)
        plain = trajectory_curvature(x)[0]
        one, none = torch.ones(3, 12), torch.zeros(3, 4)
        for padded, mask in (([pad, x], [none, one]), ([x, pad], [one, none])):
            found = trajectory_curvature(torch.cat(padded, 1), torch.cat(mask, 1).long())[0]
            assert torch.equal(found, plain)
        with pytest.raises(ValueError, match=r"mask has shape \(3, 4\), the tokens \(3, 12\)"):
            trajectory_curvature(x, none.bool())


class TestDegenerate:
    @pytest.mark.parametrize("t", [0, 1, 2])
    def test_short_texts_have_no_angle(self, t):
        angle, count = trajectory_curvature(paths(2, t))
        assert angle.isnan().all() and count.tolist() == [0, 0]

    def test_repeated_tokens_have_no_direction(self):
        x = torch.tensor([[0.0, 0], [1, 0], [1, 0], [1, 1], [0, 1], [0, 1]])
        angle, count = trajectory_curvature(x)
        assert float(angle) == pytest.approx(math.pi / 2) and int(count) == 1
        assert trajectory_curvature(torch.ones(5, 3))[0].isnan()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nan_stays_in_its_text(self, bad):
        x = paths()
        x[1, 4, 2] = bad
        assert trajectory_curvature(x)[0].isnan().tolist() == [False, True, False]

    def test_an_empty_batch(self):
        assert trajectory_curvature(torch.zeros(0, 5, 3))[0].shape == (0,)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_what_changes_it(seed):
    g = torch.Generator().manual_seed(seed)
    x = paths()
    normal = torch.randn(5, 5, generator=g, dtype=torch.float64)
    plain = trajectory_curvature(x)[0]
    for same in (x @ torch.linalg.qr(normal).Q, -1e-3 * x, x + 100 * normal[0], x.flip(1)):
        torch.testing.assert_close(trajectory_curvature(same)[0], plain, rtol=1e-8, atol=0)
    for other in (x @ normal, x[:, torch.randperm(12, generator=g)].cumsum(1)):
        assert not torch.allclose(trajectory_curvature(other)[0], plain, rtol=1e-3)


class TestEstimator:
    def rows(self, lengths=(5, 1, 9, 3, 2), d=4):
        """Return texts of some lengths, one after the other, their numbers and their mean angle."""
        x = paths(1, sum(lengths), d)[0]
        angles, counts = zip(*(trajectory_curvature(text) for text in x.split(lengths)), strict=True)
        total = sum(a.item() * c.item() for a, c in zip(angles, counts, strict=True) if c)
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) * 7 % 5
        return x, numbers, total / sum(c.item() for c in counts)

    def test_the_mean_over_texts_in_any_interleaving(self):
        x, numbers, expected = self.rows()
        assert registry.get("curvature") is CurvatureEstimator
        found = CurvatureEstimator()(TensorDict({"data": x, "text": numbers}))["curvature"]
        assert found.item() == pytest.approx(expected, rel=1e-6)
        # Token by token, as generation has them: the order within a text stays.
        order = torch.cat([torch.arange(len(part)) for part in x.split((5, 1, 9, 3, 2))]).argsort(stable=True)
        found = CurvatureEstimator()(TensorDict({"data": x[order], "text": numbers[order]}))["curvature"]
        assert found.item() == pytest.approx(expected, rel=1e-6)

    def test_a_stream_of_whole_texts_and_merged_states(self):
        x, numbers, expected = self.rows()
        estimator, states = CurvatureEstimator(), []
        for part in (slice(0, 6), slice(6, 15), slice(15, 15), slice(15, 20)):
            target = {"text": numbers[part].double().unsqueeze(1)}
            batch = Batch({"a": x[part], "b": 2 * x[part] + 1}, torch.arange(20)[part], target)
            states.append(estimator.update(estimator.init(batch), batch))
        merged = states[2].merge(states[3]).merge(states[0].merge(states[1]))
        assert int(merged.n) == 20
        assert estimator.score(merged)["score"].flatten().tolist() == pytest.approx([expected] * 2, rel=1e-9)

    def test_a_cut_costs_two_angles(self):
        x, text = paths(1)[0], torch.zeros(12, 1)
        state = Turns().init([x, text], torch.arange(0))
        for part in (slice(0, 5), slice(5, 12)):
            state = Turns().update(state, [x[part], text[part]], torch.arange(12)[part])
        pieces = [by_loop(x[:5]) * 3, by_loop(x[5:]) * 5]
        assert state.count.item() == 8 and state.total.item() == pytest.approx(sum(pieces), rel=1e-9)

    def test_data_sets_bad_values_and_nothing_to_measure(self):
        x = paths(2)
        x[1, 3, 0] = math.nan
        td = TensorDict({"data": x, "text": torch.zeros(2, 12)}, batch_size=[2])
        with pytest.warns(UserWarning, match="'data' held NaN"):
            found = CurvatureEstimator()(td)["curvature"]
        assert found.isnan().tolist() == [False, True] and found[0].item() == pytest.approx(by_loop(x[0]), rel=1e-6)
        assert CurvatureEstimator()(TensorDict({"data": x[0], "text": torch.arange(12)}))["curvature"].isnan()
        with pytest.raises(KeyError, match="'text'"):
            CurvatureEstimator()(TensorDict({"data": x[0]}))
        one, two = (Turns().init([x] * layers, torch.arange(0)) for layers in (2, 3))
        with pytest.raises(ValueError, match="cannot merge angles"):
            one.merge(two)


def test_a_language_model_straightens_paths(smollm2):
    from tdprobe import hf

    model, tokenizer = smollm2
    (batch,) = hf.batches(hf.read_texts("demo", limit=12), tokenizer, batch_size=12)
    with torch.no_grad(), ActivationCaching(r"model\.layers\.(0|15)$").prepare(model) as hooked:
        hooked(**batch.inputs)
    mask = batch.inputs["attention_mask"].bool()
    # The first token of a text is left out by LayerScoring.
    mask[torch.arange(12), mask.long().argmax(1)] = False
    cache = hooked.hooking_context.cache
    measured = [trajectory_curvature(cache[f"model.layers.{i}"], mask) for i in (0, 15)]
    first, middle = ((angle * count).sum().item() / count.sum().item() for angle, count in measured)
    assert middle < first < 2 * math.pi / 3 + 0.1
    scoring = LayerScoring(r"model\.layers\.(0|15)$", ["curvature"], rows_per_update=4096, max_norm=None)
    with torch.no_grad(), scoring.prepare(model) as hooked:
        hooked(**batch.inputs, text=torch.arange(12))
    found = hooked.hooking_context.scores().block("curvature").values.flatten().tolist()
    assert found == pytest.approx([first, middle], rel=1e-6)
