"""Rows at another scale: closed forms, invariances of the scores, and what a stream does to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tdprobe import LayerScoring, compare_layers
from tdprobe.errors import ConfigError
from tdprobe.latent import CkaEstimator
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.representation_similarity import cka_matrix
from tdprobe.latent.scorer import Scorer
from tdprobe.stream.batch import Batch
from tdprobe.stream.rescale import selected


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(**rows):
    return Batch(rows, torch.arange(len(next(iter(rows.values())))))


class TestRows:
    def test_unit_rows_keep_their_direction(self):
        x = normal(20, 6) * torch.logspace(-200, 200, 20, dtype=torch.float64).unsqueeze(1)
        found = selected(batch(a=x), None, "unit").rows["a"]
        torch.testing.assert_close(found, torch.nn.functional.normalize(x / x.abs().amax(1, keepdim=True), dim=1))

    @pytest.mark.parametrize("offset", [0.0, 1e4])
    def test_standard_rows_are_those_of_a_layer_norm(self, offset):
        x = 3 * normal(20, 16).float() + offset
        found = selected(batch(a=x), None, "standard").rows["a"]
        expected = torch.nn.functional.layer_norm(x.double(), (16,), eps=0.0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)

    def test_long_rows_are_shortened_where_they_are_long_and_nowhere_else(self):
        x, y = torch.ones(9, 4).double(), normal(9, 2)
        x[3] *= 100
        found = selected(batch(a=x, b=y), 4, "clip")
        assert found.rows["a"][3].tolist() == pytest.approx([4.0] * 4)
        assert torch.equal(found.rows["b"], y) and found.n == 9 and float(x[3, 0]) == 100

    @pytest.mark.parametrize("how", ["unit", "standard"])
    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
    def test_half_precision_is_computed_in_more(self, how, kind):
        x = (10 * normal(9, 8)).to(kind)
        found = selected(batch(a=x), None, how).rows["a"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, selected(batch(a=x.float()), None, how).rows["a"])

    @pytest.mark.parametrize("how", ["unit", "standard", "clip"])
    def test_rows_without_direction_and_nan(self, how):
        x = normal(9, 4)
        x[2], x[5, 1] = 0, torch.nan
        found = selected(batch(a=x), 4, how).rows["a"]
        assert found[2].tolist() == [0] * 4 and found[5].isnan().any() and found[[0, 1, 3, 4, 6, 7, 8]].isfinite().all()


class TestScores:
    @pytest.mark.parametrize("how", ["unit", "standard"])
    def test_any_portions_give_the_measure_of_rescaled_rows(self, how):
        x, y = normal(90, 5) + 1, normal(90, 7, seed=1) + 2
        y[:, :5] += x
        scaled = [selected(batch(a=z), None, how).rows["a"] for z in (x, y)]
        expected = float(cka_matrix(scaled, unbiased=True)[0, 1])
        for size in (8, 90):
            scorer = Scorer(resolve_estimators([CkaEstimator(unbiased=True)]), size, None, rescale=how)
            for start in range(0, 90, 9):
                part = slice(start, start + 9)
                scorer.push(Batch({"a": x[part], "b": y[part]}, torch.arange(90)[part]))
            assert float(scorer.scores()["cka"][0, 1]) == pytest.approx(expected, rel=1e-9)
        plain = float(cka_matrix([x, y], unbiased=True)[0, 1])
        assert scorer.facts()["rescale"] == how and abs(expected - plain) > 0.01

    def test_unit_rows_forget_lengths_and_clipped_ones_lose_no_sample(self):
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Identity())
        x = torch.randn(64, 6)
        lengths = torch.ones(64, 1)
        lengths[::16] = 1e3
        tables = {}
        for how in ("unit", "clip", None):
            for name, rows in (("plain", x), ("long", x * lengths)):
                scoring = LayerScoring(
                    r"\d", ["participation_ratio"], rescale=how, max_norm=None if how == "unit" else 4, skip_first=0
                )
                with scoring.prepare(model) as hooked:
                    hooked(rows)
                tables[how, name] = hooked.scores()
        values = {key: float(table.matrix()[0]) for key, table in tables.items()}
        assert values["unit", "plain"] == pytest.approx(values["unit", "long"], rel=1e-5)
        counts = {key: (table.blocks[0].n, table.meta["outliers"]) for key, table in tables.items()}
        assert counts["clip", "long"] == counts["unit", "long"] == (64, 0) and counts[None, "long"] == (60, 4)
        assert tables["clip", "long"].meta["rescale"] == "clip" and "rescale" not in tables[None, "plain"].meta

    def test_samples_of_checkpoints_are_rescaled_as_well(self):
        torch.manual_seed(0)
        models = {name: nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for name in "ab"}
        options = {"estimators": [CkaEstimator()], "progress": False, "rescale": "standard"}
        rows = [torch.randn(40, 6)]
        found = [compare_layers(models, rows, r"\d", one_at_a_time=one, **options) for one in (True, False)]
        assert [table.meta["rescale"] for table in found] == ["standard"] * 2
        np.testing.assert_allclose(found[0].cube().values, found[1].cube().values, rtol=1e-5)
        plain = compare_layers(models, rows, r"\d", **{**options, "rescale": None})
        assert abs(plain.cube().values - found[1].cube().values).max() > 0.01

    @pytest.mark.parametrize("make", [lambda **o: LayerScoring("x", **o), lambda **o: Scorer({}, **o)])
    def test_arguments(self, make):
        with pytest.raises(ConfigError, match="unknown rescale 'units'; did you mean 'unit'"):
            make(rescale="units")
        with pytest.raises(ConfigError, match="rescale='clip' shortens rows to max_norm median lengths"):
            make(rescale="clip", max_norm=None)
