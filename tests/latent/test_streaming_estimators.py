"""Neighbour estimators in a stream: one bank, one neighbour pass, and the tables that come of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from neighbor_tools import scored
from tdprobe import registry
from tdprobe.estimator import score_all
from tdprobe.latent import (
    InformationImbalanceEstimator,
    LayerScoring,
    LocalKnnDimensionEstimator,
    TwoNnDimensionEstimator,
)
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.score_blocks import score_blocks
from tdprobe.latent.scorer import Scorer
from tdprobe.stats import Neighbors
from tdprobe.stream.batch import Batch

NEIGHBOURS = ["information_imbalance", "twonn", "local_knn"]


@pytest.fixture
def passes(monkeypatch):
    """List every neighbour pass."""
    made, run = [], Neighbors.of_rows
    monkeypatch.setattr(Neighbors, "of_rows", lambda self, *args: made.append(self) or run(self, *args))
    return made


def layers(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    return {"a": x, "b": x[:, :3].contiguous(), "c": torch.randn(n, 40, generator=g), "a again": 2 * x + 1}


def push(scorer, rows, size=30):
    n = len(next(iter(rows.values())))
    for start in range(0, n, size):
        part = slice(start, start + size)
        scorer.push(Batch({name: x[part] for name, x in rows.items()}, torch.arange(n)[part] * 11))
    return scorer


class TestOnePass:
    def test_scores_are_those_of_single_estimators(self, passes):
        estimators = resolve_estimators(["cka", *NEIGHBOURS])
        scorer = push(Scorer(estimators, portion=64, max_norm=None), layers())
        found = scorer.scores()
        assert passes == [Neighbors((1, 2, 14, 28), imbalance=True)]
        rows = list(layers().values())
        for label in NEIGHBOURS:
            alone = scored(estimators[label], *rows)["score"]
            torch.testing.assert_close(found[label], alone, rtol=1e-12, atol=0)
        assert found["cka"].shape == (4, 4) and found["twonn"].shape == found["local_knn"].shape == (4,)

    def test_everything_that_reads_neighbours_shares_the_pass(self, passes):
        names = [*NEIGHBOURS, "mle", "gride", "corr_int", "local_pca", "mutual_knn", "jaccard", "rank_similarity"]
        estimators = resolve_estimators([*names, "second_order_cosine"])
        scorer = push(Scorer(estimators, portion=64, max_norm=None), layers())
        found = scorer.scores()
        # Cosines have neighbours of their own.
        assert sorted(made.directions for made in passes) == [False, True]
        assert max(passes, key=lambda made: made.places).imbalance
        for label, estimator in estimators.items():
            alone = scored(estimator, *layers().values())["score"]
            torch.testing.assert_close(found[label], alone, rtol=1e-12, atol=1e-14)

    def test_and_those_of_one_shot_calls(self):
        found = push(Scorer(resolve_estimators(NEIGHBOURS), max_norm=None), layers()).scores()
        rows = list(layers().values())
        td = TensorDict({"data": rows[2], "data_a": rows[0], "data_b": rows[1]})
        registry.streaming("twonn")(td)
        assert float(found["twonn"][2]) == pytest.approx(td["dimension"].item(), rel=1e-6)
        registry.streaming("local_knn")(td)
        assert float(found["local_knn"][2]) == pytest.approx(float(td["dimension"].quantile(0.5)), rel=1e-6)
        registry.streaming("information_imbalance")(td)
        assert float(found["information_imbalance"][0, 1]) == pytest.approx(td["information_imbalance_a_to_b"].item())
        assert float(found["information_imbalance"][1, 0]) == pytest.approx(td["information_imbalance_b_to_a"].item())

    def test_batches_and_their_order_do_not_matter(self):
        whole = push(Scorer(resolve_estimators(NEIGHBOURS), max_norm=None), layers(), size=200).scores()
        parts = push(Scorer(resolve_estimators(NEIGHBOURS), portion=16, max_norm=None), layers(), size=7).scores()
        assert all(torch.equal(whole[label], parts[label]) for label in NEIGHBOURS)

    def test_merged_states_score_like_one_stream(self):
        rows, ids, estimator = layers(), torch.arange(200), registry.streaming("twonn")
        halves = []
        for part in (slice(0, 90), slice(90, 200)):
            batch = Batch({name: x[part] for name, x in rows.items()}, ids[part])
            halves.append(estimator.update(estimator.init(batch), batch))
        merged = estimator.score(halves[1].merge(halves[0]))["score"]
        assert torch.equal(merged, scored(estimator, *rows.values())["score"])

    def test_a_state_is_a_value(self):
        estimators = resolve_estimators(NEIGHBOURS)
        scorer = push(Scorer(estimators, max_norm=None), layers())
        states = {estimators[label].statistic(): state for label, state in scorer.states().items()}
        (state,) = states.values()
        before = state.clone()
        first, second = (score_all(estimators, states) for _ in range(2))
        assert torch.equal(first["twonn"]["score"], second["twonn"]["score"])
        assert all(torch.equal(state.rows[key], before.rows[key]) for key in state.rows.keys())

    def test_other_rules_or_banks_get_a_pass_of_their_own(self, passes):
        strict, small = TwoNnDimensionEstimator(), LocalKnnDimensionEstimator(bank_size=50, distinct=True)
        push(Scorer(resolve_estimators(["twonn", strict, small]), max_norm=None), layers()).scores()
        assert sorted(passes, key=repr) == sorted(
            [Neighbors((1, 2)), Neighbors((1, 2), distinct=False, beyond=1e-5), Neighbors((7, 14))], key=repr
        )

    def test_the_bank_bounds_what_is_kept_and_is_what_n_says(self):
        estimators = resolve_estimators([InformationImbalanceEstimator(bank_size=60), "cka"])
        scorer = push(Scorer(estimators, portion=50, max_norm=None), layers())
        scored = scorer.scored()
        assert {label: found.n for label, found in scored.items()} == {"information_imbalance": 60, "cka": 200}
        blocks = score_blocks(scored, estimators, [("m", name) for name in scorer.layers])
        assert {block.estimator: block.n for block in blocks} == {"information_imbalance": 60, "cka": 200}


class TestTables:
    def test_blocks_of_asymmetric_pairs_and_single_layers(self):
        estimators = resolve_estimators(["cka", *NEIGHBOURS])
        scorer = push(Scorer(estimators, max_norm=None), layers())
        labels = [("one", "x"), ("one", "y"), ("two", "x"), ("two", "z")]
        scores = scorer.scores()
        blocks = {block.key: block for block in score_blocks(scorer.scored(), estimators, labels)}
        pairs = [(a, b) for a in ("one", "two") for b in ("one", "two")]
        assert {key[1:] for key in blocks if key[0] == "information_imbalance"} == set(pairs)
        assert {key[1:] for key in blocks if key[0] == "cka"} == {
            ("one", "one"),
            ("one", "two"),
            ("two", "two"),
        }
        assert {key[1:] for key in blocks if key[0] == "twonn"} == {("one", "one"), ("two", "two")}
        delta = scores["information_imbalance"].numpy()
        there, back = (
            blocks["information_imbalance", "one", "two"],
            blocks["information_imbalance", "two", "one"],
        )
        assert (there.layers_a, there.layers_b) == (("x", "y"), ("x", "z")) and not there.symmetric
        assert np.array_equal(there.values, delta[:2, 2:]) and np.array_equal(back.values, delta[2:, :2])
        assert not np.allclose(there.values, back.values.T)
        # From all columns to three of them is easy, back is not; a copy knows and is known.
        assert delta[0, 1] < delta[1, 0] and delta[0, 3] == delta[3, 0] == 2 / 200

    def test_a_layer_that_is_not_finite_is_named_once_and_the_others_are_scored(self):
        rows = layers()
        rows["b"] = rows["b"].clone()
        rows["b"][17, 0] = math.nan
        scorer = push(Scorer(resolve_estimators(NEIGHBOURS), max_norm=None), rows)
        with pytest.warns(UserWarning, match="^'b' held NaN or infinite values") as caught:
            found = scorer.scores()
        assert len(caught) == 1
        assert found["twonn"].isnan().tolist() == found["local_knn"].isnan().tolist() == [False, True, False, False]
        bad = found["information_imbalance"].isnan()
        assert bad[1].all() and bad[:, 1].all() and int(bad.sum()) == 7

    def test_duplicates_are_counted_in_the_table_and_in_one_warning(self):
        model = nn.Sequential(nn.Identity(), nn.Tanh())
        x = torch.randn(40, 4)
        with LayerScoring(r"[01]$", estimators=NEIGHBOURS).prepare(model) as hooked:
            hooked(torch.cat([x, x[:12]]))
        with pytest.warns(UserWarning, match="^12 rows of '0', 12 rows of '1' repeat earlier ones") as caught:
            table = hooked.hooking_context.scores()
        assert len(caught) == 1 and table.meta["duplicates"] == {"0": 12, "1": 12}
        assert table.matrix("twonn").shape == (2,) and table.matrix("information_imbalance").shape == (2, 2)
        assert np.isfinite(table.matrix("twonn")).all()

    def test_too_few_rows_say_what_is_needed(self):
        model = nn.Sequential(nn.Linear(4, 4))
        with LayerScoring("0", estimators=["local_knn"]).prepare(model) as hooked:
            hooked(torch.randn(4, 4))
        with pytest.raises(ValueError, match=r"got 4 rows; local_knn with k=2 needs at least 2k\+1 = 5"):
            hooked.hooking_context.scores()


class TestRealModel:
    def test_a_language_model_in_one_pass(self, smollm2, passes):
        from tdprobe import hf

        model, tokenizer = smollm2
        texts = [text for text in hf.read_texts("demo") if len(text) < 120][:48]
        scoring = LayerScoring(r"model\.(embed_tokens|layers\.\d+)$", ["cka", *NEIGHBOURS], max_norm=None)
        with scoring.prepare(model) as hooked, torch.no_grad():
            for batch in hf.batches(texts, tokenizer, batch_size=16, max_length=48):
                hooked(**batch.inputs)
        context = hooked.hooking_context
        table = context.scores()
        assert len(passes) == 1 and passes[0].imbalance
        n, names = context.n_rows, list(context.scorer.layers)
        # Without position and context a token is a row of the embedding: its repetitions are duplicates.
        ids = [i for b in hf.batches(texts, tokenizer, batch_size=16, max_length=48) for i in kept_ids(b.inputs)]
        assert n == len(ids) and table.meta["duplicates"][names[0]] == n - len(set(ids))
        dimension = table.matrix("twonn")
        assert dimension.shape == (31,) and np.isfinite(dimension).all()
        assert (dimension > 2).all() and (dimension < 60).all()
        imbalance = table.matrix("information_imbalance")
        # Neighbouring layers know each other well, far better than the first and the last do.
        next_to = np.diagonal(imbalance, 1)[1:]
        assert next_to.max() < 0.2 and imbalance[1, -1] > 2 * np.median(next_to)
        np.testing.assert_allclose(imbalance.diagonal()[1:], 2 / n, rtol=0.2)


def kept_ids(inputs):
    """Return the token ids that count: no padding, and not the first of each text."""
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        yield from ids[mask.bool()][1:].tolist()
