"""Standard errors, null scores and routes: what a table says of each score besides its value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdprobe import compare_layers, registry
from tdprobe.errors import CallError, ConfigError, MissingKeyError
from tdprobe.estimator import LayerEstimator, SupervisedEstimator
from tdprobe.latent import CkaEstimator, LayerScoring, ProcrustesEstimator
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.kept_states import GroupedState, Source, with_least_work
from tdprobe.latent.scorer import Scorer
from tdprobe.registry import Spec
from tdprobe.stats import Cross, Gram, Moments, Reservoir, layer_list
from tdprobe.stats.routes import cheapest
from tdprobe.stream.batch import Batch
from tdprobe.tables import ScoreTable

IDS = torch.arange(100_000) * 7919


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spec(name, kind="layer", symmetric=False):
    return Spec(name, kind, symmetric, (0.0, 1.0), "larger", frozenset(), ("moments",), "n d", "none")


class FirstMean(LayerEstimator):
    """Mean of the first column."""

    spec = spec("first-mean")

    def __init__(self):
        super().__init__(["data"], ["mean"])

    def statistic(self):
        return Moments()

    def score(self, state):
        return TensorDict({"score": torch.stack([mu[0] for mu in layer_list(state.mu)])})


class Correlation(SupervisedEstimator):
    """Correlation of the first column of a layer with each target."""

    spec = spec("correlation", "supervised")

    def __init__(self, in_key="latents", target_key="attributes"):
        super().__init__([in_key, target_key], ["correlation"])
        self.in_key, self.target_key = in_key, target_key

    def statistic(self):
        return Reservoir(1000)

    def score(self, state):
        *layers, targets = layer_list(state.rows)
        columns = [torch.corrcoef(torch.cat([x[:, :1].double(), targets], 1).T)[0, 1:] for x in layers]
        return TensorDict({"score": torch.stack(columns)})


def scorer(*estimators, **options):
    return Scorer(resolve_estimators(estimators), **{"portion": 10, "max_norm": None} | options)


def push(scoring, rows, targets=None, size=10):
    n = len(next(iter(rows.values())))
    for start in range(0, n, size):
        part = slice(start, start + size)
        known = {key: value[part] for key, value in (targets or {}).items()}
        scoring.push(Batch({name: x[part] for name, x in rows.items()}, IDS[:n][part], known))
    return scoring


class TestStandardErrors:
    def test_of_a_mean_is_that_of_the_mean(self):
        se = []
        for seed in range(20):
            found = push(scorer(FirstMean(), portion=50), {"a": normal(4000, 2, seed=seed)}, size=50).scored()
            se.append(float(found["first-mean"].se[0]))
        assert np.sqrt(np.mean(np.square(se))) == pytest.approx(1 / 4000**0.5, rel=0.2)

    def test_of_cka_covers_its_spread(self):
        values, se = [], []
        for seed in range(30):
            x = normal(1200, 6, seed=seed)
            rows = {"a": x, "b": 0.6 * x + normal(1200, 6, seed=seed + 1000)}
            found = push(scorer("cka", portion=40), rows, size=40).scored()["cka"]
            values.append(float(found.score[0, 1]))
            se.append(float(found.se[0, 1]))
        assert np.mean(se) == pytest.approx(np.std(values), rel=0.35)

    def test_leaving_out_a_group_is_scoring_the_others(self):
        rows = {"a": normal(200, 3), "b": normal(200, 4, seed=1)}
        scoring = push(scorer("cka", groups=5), rows)
        held = next(iter(scoring.kept().values()))
        for place, state in enumerate(held.without()):
            others = [part for other, part in enumerate(held.filled) if other != place]
            assert int(state.n) == sum(int(part.n) for part in others)
            torch.testing.assert_close(state.hsic, sum(part.hsic for part in others), rtol=1e-12, atol=0)

    def test_groups_do_not_change_scores_and_none_says_nothing(self):
        rows = {"a": normal(200, 3), "b": normal(200, 4, seed=1)}
        with_groups, without = (push(scorer("cka", groups=groups), rows).scored()["cka"] for groups in (8, 0))
        torch.testing.assert_close(with_groups.score, without.score, rtol=1e-12, atol=0)
        assert without.se is None and with_groups.se.shape == (2, 2)

    def test_the_order_of_the_stream_does_not_matter(self):
        rows = {"a": normal(200, 3), "b": normal(200, 4, seed=1)}
        first, second = scorer("cka"), scorer("cka")
        portions = [
            Batch({name: x[start : start + 18] for name, x in rows.items()}, IDS[start : start + 18])
            for start in range(0, 198, 18)
        ]
        for scoring, order in ((first, portions), (second, portions[::-1])):
            scoring.portion = scoring._buffer.portion = 10
            for part in order:
                # Whole batches at once: every portion is then the same in both orders.
                scoring._buffer.reserve = 0
                scoring.push(part.select(slice(10)))
        # Of a layer with itself the error is 0, up to rounding.
        torch.testing.assert_close(first.scored()["cka"].se, second.scored()["cka"].se, rtol=1e-9, atol=1e-12)

    def test_a_state_that_is_too_large_is_kept_once(self, monkeypatch):
        monkeypatch.setattr("tdprobe.latent.kept_states.GROUP_BUDGET", 1000)
        found = push(scorer(FirstMean()), {"a": normal(100, 40)}).scored()["first-mean"]
        assert found.se is None

    def test_one_group_has_no_other(self):
        state = Moments().update(Moments().init([normal(9, 2)], IDS[:9]), [normal(9, 2)], IDS[:9])
        assert list(GroupedState((None, state)).without()) == [] and GroupedState((None, state)).total() is state


class TestNulls:
    def test_unrelated_layers_are_within_and_related_ones_beyond(self):
        x = normal(300, 5)
        rows = {"a": x, "b": x + 0.1 * normal(300, 5, seed=1), "c": normal(300, 5, seed=2)}
        found = push(scorer("cka", "information_imbalance", null=19, portion=300), rows, size=300).scored()
        for label in ("cka", "information_imbalance"):
            p = found[label].null.p
            assert p[0, 1] == p[1, 0] == p[0, 0] == pytest.approx(0.05)
            assert p[0, 2] > 0.05 and p[2, 1] > 0.05
        # Unbiased CKA of unrelated rows is 0, imbalance 1.
        assert abs(float(found["cka"].null.mean[0, 2])) < 0.02
        assert float(found["information_imbalance"].null.mean[0, 2]) == pytest.approx(1, abs=0.06)

    def test_biased_cka_of_few_rows_is_not_zero_by_chance(self):
        rows = {"a": normal(64, 100), "b": normal(64, 100, seed=1)}
        found = push(scorer(CkaEstimator(minibatch=True), null=9, portion=64), rows, size=64).scored()["cka"]
        # The biased estimate of independent Gaussians: d^2 n (n - 1) against d n (n - 1) (n - 1 + d), or so.
        assert float(found.null.mean[0, 1]) == pytest.approx(100 / (63 + 100), abs=0.03)
        assert float((found.score[0, 1] - found.null.mean[0, 1]) / found.null.sd[0, 1]) < 4

    def test_p_of_unrelated_layers_is_uniform(self):
        p = []
        for seed in range(60):
            rows = {"a": normal(60, 3, seed=seed), "b": normal(60, 3, seed=seed + 500)}
            p.append(float(push(scorer("cka", null=9, portion=60), rows, size=60).scored()["cka"].null.p[0, 1]))
        counts = np.histogram(p, bins=5, range=(0.05, 1.05))[0]
        # 12 of 60 are expected in each fifth; the variance of a count is 9.6.
        assert abs(counts - 12).max() < 12

    def test_layers_by_themselves_have_no_null(self):
        assert push(scorer(FirstMean(), null=3), {"a": normal(50, 3)}).scored()["first-mean"].null is None


class TestRoutes:
    def test_tables_say_how_scores_came_about(self):
        rows = {"a": normal(60, 3), "b": normal(60, 4, seed=1)}
        found = push(scorer("cka", "twonn", CkaEstimator()), rows).scored()
        assert [found[label].route for label in ("cka", "twonn", "cka-2")] == [
            "minibatch Grams",
            "bank of 4096 rows",
            "cross-covariances",
        ]

    # Cross products of 12 columns take 108 n multiplications, Grams of two layers 8 n^2.
    @pytest.mark.parametrize("unbiased", [False, True])
    @pytest.mark.parametrize(("n", "route"), [(13, "Grams of all rows"), (14, "cross-covariances")])
    def test_of_rows_that_are_all_there_the_cheaper_route_is_taken_and_the_value_is_one(self, n, route, unbiased):
        rows = {"a": normal(n, 6), "b": normal(n, 6, seed=1)}
        estimator = CkaEstimator(unbiased=unbiased)
        found = push(scorer(estimator, portion=n, whole=True), rows, size=n).scored()["cka"]
        stream = push(scorer(estimator, portion=8), rows, size=n).scored()["cka"]
        assert found.route == route and stream.route == "cross-covariances"
        torch.testing.assert_close(found.score, stream.score, rtol=1e-9, atol=1e-12)
        one = estimator(TensorDict({"data_a": rows["a"], "data_b": rows["b"]}))["cka"]
        assert float(one) == pytest.approx(float(stream.score[0, 1]), rel=1e-6)
        assert estimator._one_shot(Batch(rows, IDS[:n])).route == route

    @pytest.mark.parametrize("unbiased", [False, True])
    def test_what_another_measure_reads_anyway_is_shared(self, unbiased):
        rows = {"a": normal(13, 6), "b": normal(13, 6, seed=1)}
        scoring = scorer(CkaEstimator(unbiased=unbiased), ProcrustesEstimator(), portion=13, whole=True)
        found = push(scoring, rows, size=13).scored()
        assert [item.route for item in found.values()] == ["cross-covariances"] * 2 and len(scoring._states) == 1

    def test_a_stream_keeps_one_state_for_all_measures_of_covariances(self):
        model, batches = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double(), normal(120, 5).split(20)
        unbiased, biased, sketched = CkaEstimator(unbiased=True), CkaEstimator(), ProcrustesEstimator(sketch=3)
        estimators = {"biased": biased, "procrustes": ProcrustesEstimator(), "unbiased": unbiased, "sketched": sketched}

        def scored(wanted, **options):
            with LayerScoring(r"\d", wanted, rows_per_update=16, **options).prepare(model) as hooked:
                for x in batches:
                    hooked(x)
            return hooked.scores(), [source.statistic for source in hooked.hooking_context.scorer.kept()]

        together, kept = scored(estimators, null=3)
        assert kept == [Cross(True), Cross(sketch=3), Reservoir()]
        assert len(scored([biased, unbiased, "procrustes", "cca", "linear_regression", "gulp"])[1]) == 1
        for label, estimator in estimators.items():
            one, other = together.block(label), scored({label: estimator}, null=3)[0].block(label)
            for field in ("values", "se", "null", "null_sd"):
                np.testing.assert_allclose(getattr(one, field), getattr(other, field), rtol=1e-9, atol=1e-12)

    def test_products_that_do_not_fit_are_not_taken_however_little_work_they_are(self):
        rows = {"a": normal(60, 6), "b": normal(60, 6, seed=1)}
        found = push(scorer(CkaEstimator(), portion=60, whole=True, memory_budget=500.0), rows, size=60).scored()
        assert found["cka"].route == "Grams of all rows"
        exact = push(scorer(CkaEstimator(), portion=60), rows, size=60).scored()["cka"].score
        torch.testing.assert_close(found["cka"].score, exact, rtol=1e-9, atol=0)

    def test_thirty_wide_layers(self):
        # 30 layers of 576 columns: 17,280 columns in all, which is about where both take the same work.
        routes = CkaEstimator().at_hand()
        assert [cheapest(routes, [576] * 30, n).name for n in (2048, 16384, 20480)] == ["gram", "gram", "cross"]
        assert cheapest(routes, [576] * 30, 20480, budget=2**30).name == "gram"

    def test_shuffled_rows_are_all_there_and_sketched_ones_stay_sketched(self):
        exact, sketched = (Source(Cross(sketch=sketch)) for sketch in (None, 4))
        estimators, widths = [CkaEstimator()], [6] * 4
        assert with_least_work(exact, estimators, widths, 14, 1e9).statistic == Gram(False, whole=True)
        assert with_least_work(exact, estimators, widths, 1000, 1e9) == exact
        assert with_least_work(sketched, estimators, widths, 14, 1e9) == sketched
        assert with_least_work(exact, [*estimators, ProcrustesEstimator()], widths, 14, 1e9) == exact

    def test_a_comparison_of_samples_says_so(self):
        torch.manual_seed(0)
        models = {name: nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for name in "ab"}
        batches = [torch.randn(12, 6)]
        options = {"estimators": [CkaEstimator()], "progress": False}
        found = [compare_layers(models, batches, r"\d", one_at_a_time=one, **options) for one in (True, False)]
        assert [{row.route for row in table} for table in found] == [{"Grams of all rows"}, {"cross-covariances"}]
        np.testing.assert_allclose(found[0].cube().values, found[1].cube().values, rtol=1e-5)

    def test_a_state_beyond_the_budget_takes_a_cheaper_route_and_says_so(self, monkeypatch):
        monkeypatch.setattr(Cross, "cheaper", lambda self: Reservoir(32))
        with pytest.warns(UserWarning, match="takes the route 'bank of 32 rows' instead"):
            scoring = scorer(CkaEstimator(), memory_budget=5000.0)
            scoring._begin(Batch({"a": normal(20, 30)}, IDS[:20]))
        assert next(iter(scoring._states)).statistic == Reservoir(32)

    def test_a_bank_is_halved_until_it_fits_or_refused(self):
        rows = {"a": normal(40, 300)}
        with pytest.warns(UserWarning, match="takes the route 'bank of 1024 rows' instead"):
            assert push(scorer("twonn", memory_budget=2e6), rows).scored()["twonn"].route == "bank of 1024 rows"
        with pytest.raises(ConfigError, match="twonn by bank of 512 rows would keep"):
            push(scorer("twonn", memory_budget=1e5), rows)

    def test_or_is_refused_before_anything_is_kept(self, monkeypatch):
        monkeypatch.setattr(Moments, "cheaper", lambda self: None)
        with pytest.raises(ConfigError, match="first-mean by covariance would keep .* memory_budget is"):
            scorer(FirstMean(), memory_budget=1000.0).push(Batch({"a": normal(20, 30)}, IDS[:20]))

    @pytest.mark.parametrize("options", [{"groups": 2}, {"groups": True}, {"null": -1}, {"null": 2.5}])
    def test_counts_that_mean_nothing(self, options):
        with pytest.raises(ConfigError, match="groups|null"):
            scorer("cka", **options)

    def test_an_option_that_does_not_exist(self):
        from tdprobe.compare import LayerComparison

        with pytest.raises(CallError, match="unknown argument 'nul'; did you mean 'null'"):
            LayerComparison({"m": nn.Linear(2, 2)}, nul=3)


class TestTables:
    @pytest.fixture
    def table(self):
        x = normal(200, 5)
        model = nn.ModuleDict({"near": nn.Linear(5, 5), "same": nn.Identity()})

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = model.double()

            def forward(self, x):
                self.parts["same"](x)
                return self.parts["near"](x)

        torch.manual_seed(0)
        with LayerScoring("parts", ["cka", "twonn"], null=19, rows_per_update=20).prepare(Both()) as hooked:
            hooked(x)
        return hooked.hooking_context.scores()

    def test_rows_say_all_there_is(self, table):
        row = next(row for row in table if row.estimator == "cka" and row.layer_a != row.layer_b)
        assert row.p == pytest.approx(0.05) and row.se > 0 and abs(row.null) < 0.1 and row.route == "minibatch Grams"
        assert {"se", "null", "p", "route"} <= set(table.to_pandas().columns)
        twonn = next(row for row in table if row.estimator == "twonn")
        assert twonn.se > 0 and np.isnan(twonn.p)

    def test_json_brings_it_all_back(self, table):
        assert ScoreTable.from_json(table.to_json()) == table

    def test_a_table_of_the_first_version_is_read(self):
        block = (
            '{"estimator": "cka", "checkpoint_a": "m", "checkpoint_b": "m", "layers_a": ["x"], '
            '"layers_b": ["x"], "n": 3, "symmetric": true, "values": [1.0]}'
        )
        text = f'{{"format": "tdprobe.scores", "version": 1, "meta": {{}}, "blocks": [{block}]}}'
        (found,) = ScoreTable.from_json(text).blocks
        assert found.values.tolist() == [[1.0]] and found.se is None and found.route == ""

    def test_significant_keeps_what_unrelated_rows_do_not_reach(self, table):
        kept = table.significant(0.05)
        assert kept.estimators == ("cka",) and np.isfinite(kept.matrix("cka")).all()
        with pytest.raises(
            ConfigError, match="19 permutations give no p below 0.05; for alpha=0.01 score with null=99"
        ):
            table.significant(0.01)
        with pytest.raises(ConfigError, match="no null to compare with"):
            table.select("twonn").significant()
        with pytest.raises(ConfigError, match="between 0 and 1"):
            table.significant(5)

    def test_labels_of_the_users_own_keep_their_method(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        with LayerScoring(r"\d", {"mine": CkaEstimator(minibatch=True)}).prepare(model) as hooked:
            hooked(torch.randn(40, 3))
        (block,) = hooked.hooking_context.scores().blocks
        assert block.estimator == "mine" and block.registry_name == "cka"


class TestSupervised:
    def test_one_shot(self):
        x, y = normal(50, 3), normal(50, 2, seed=1)
        td = Correlation()(TensorDict({"latents": x, "attributes": y}))
        expected = [np.corrcoef(x[:, 0], y[:, i])[0, 1] for i in range(2)]
        assert td["correlation"].tolist() == pytest.approx(expected, rel=1e-5)
        td = Correlation()(TensorDict({"latents": x, "attributes": y[:, 0]}))
        assert td["correlation"].tolist() == pytest.approx(expected[:1], rel=1e-5)

    def test_attributes_come_with_each_call(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
        x, y = normal(60, 3), normal(60, 2, seed=1)
        with LayerScoring(r"\d", [Correlation(), "cka"]).prepare(model) as hooked:
            for part in (slice(0, 25), slice(25, 60)):
                hooked(TensorDict({"input": x[part], "attributes": y[part]}, batch_size=[len(x[part])]))
        table = hooked.hooking_context.scores()
        block = table.block("correlation")
        assert block.layers_b == ("attributes[0]", "attributes[1]") and block.layers_a == ("0", "1")
        with torch.no_grad():
            values = model[0](x)
        assert block.values[0, 1] == pytest.approx(np.corrcoef(values[:, 0], y[:, 1])[0, 1])
        assert table.matrix("cka").shape == (2, 2)

    def test_attributes_of_texts_are_repeated_for_their_tokens(self, tiny_llama):
        ids = torch.randint(1, 60, (4, 7), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        label = torch.tensor([3.0, 1.0, 4.0, 1.5])
        scoring = LayerScoring(r"model\.layers\.\d+$", [Correlation()], skip_first=0)
        with scoring.prepare(tiny_llama) as hooked, torch.no_grad():
            hooked(input_ids=ids, attention_mask=mask, attributes=label)
        context = hooked.hooking_context
        (held,) = context.scorer.kept().values()
        state = held.total()
        targets = layer_list(state.rows)[-1]
        assert sorted(targets.flatten().tolist()) == sorted(label.repeat_interleave(mask.sum(1)).tolist())

    def test_a_call_without_them_says_what_is_missing(self):
        model = nn.Sequential(nn.Linear(3, 3))
        with LayerScoring("0", [Correlation()], required=False).prepare(model) as hooked:
            with pytest.raises((KeyError, TypeError), match="attributes"):
                hooked(TensorDict({"input": torch.randn(4, 3)}))
            with pytest.raises(TypeError, match=r"'attributes' is missing; .* hooked\(x, attributes=...\)"):
                hooked(torch.randn(4, 3))
            with pytest.raises(TypeError, match="the call has 'attributs': is that a typing error"):
                hooked(torch.randn(4, 3), attributs=torch.zeros(4))
        with pytest.raises(MissingKeyError, match="reads 'attributes' along with the layers, and nothing came along"):
            scorer(Correlation()).push(Batch({"a": normal(10, 2)}, IDS[:10]))

    @pytest.mark.parametrize("value", [torch.zeros(3), torch.tensor(1.0)])
    def test_targets_that_do_not_fit(self, value):
        with LayerScoring("0", [Correlation()], required=False).prepare(nn.Sequential(nn.Linear(3, 3))) as hooked:
            with pytest.raises(ConfigError, match="'attributes' has shape"):
                hooked(torch.randn(4, 3), attributes=value)


def test_a_null_takes_the_route_of_the_score_in_parts_where_memory_is_short():
    rows = {name: normal(80, 6, seed=seed) for seed, name in enumerate("abcde")}
    estimator = CkaEstimator()
    enough = push(scorer(estimator, null=3, portion=80), rows, size=80).scored()["cka"]
    short = push(scorer(estimator, null=3, portion=80, memory_budget=6.0e3), rows, size=80).scored()["cka"]
    assert short.route == enough.route == "cross-covariances"
    torch.testing.assert_close(short.null.mean, enough.null.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(short.null.p, enough.null.p)


class TestEndOfABlock:
    def test_scores_are_the_same_inside_and_after_and_the_stream_goes_on(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
        with LayerScoring(r"\d", rows_per_update=30, max_norm=None).prepare(model) as hooked:
            hooked(x[:50])
            inside = hooked.scores().matrix()
        context = hooked.hooking_context
        assert context.scorer._buffer.n == 0
        np.testing.assert_array_equal(hooked.scores().matrix(), inside)
        with context:
            hooked(x[50:])
        assert context.n_rows == 90 and int(context.scorer.states()["cka"].n) == 90

    def test_an_error_keeps_the_rows_that_wait_for_more(self):
        model = nn.Sequential(nn.Linear(4, 4))
        scoring = LayerScoring("0", rows_per_update=30, max_norm=None).prepare(model)
        with pytest.raises(KeyboardInterrupt), scoring as hooked:
            hooked(torch.randn(20, 4))
            raise KeyboardInterrupt
        assert scoring.scorer._buffer.n == 20

    def test_other_layers_are_refused_after_a_block_too(self):
        found = push(scorer("cka"), {"a": normal(40, 3), "b": normal(40, 3)})
        found.flush()
        with pytest.raises(ConfigError, match="'b' did not run"):
            push(found, {"a": normal(10, 3)})


class TestWhatCannotBeScored:
    def test_is_left_out_and_the_others_keep_their_scores(self):
        rows = {"a": normal(12, 3), "b": normal(12, 3, seed=1)}
        scoring = push(scorer("cka", "mle", "mutual_knn", "twonn", null=3), rows)
        with pytest.warns(UserWarning, match=r"left out.*: mle \(got 12 rows; .*at least 21"):
            found = scoring.scored()
        assert list(found) == ["cka", "mutual_knn", "twonn"]
        alone = push(scorer("cka", "mutual_knn", "twonn", null=3), rows).scored()
        for label, scored in alone.items():
            torch.testing.assert_close(found[label].score, scored.score, rtol=0, atol=0, equal_nan=True)
        assert found["mutual_knn"].null is not None
        assert list(scoring.facts()["left_out"]) == ["mle"]

    def test_more_rows_bring_it_back(self):
        scoring = push(scorer("mle", "cka"), {"a": normal(12, 3)})
        with pytest.warns(UserWarning, match="left out"):
            assert list(scoring.scored()) == ["cka"]
        scoring.push(Batch({"a": normal(60, 3, seed=5)}, torch.arange(1000, 1060)))
        assert list(scoring.scored()) == ["mle", "cka"] and "left_out" not in scoring.facts()

    def test_is_an_error_where_nothing_is_left(self):
        with pytest.raises(ConfigError, match="got 12 rows; mle"):
            push(scorer("mle", "corr_int"), {"a": normal(12, 3)}).scored()

    def test_layers_without_a_score_are_named_once_with_the_estimators(self):
        rows = {"a": normal(200, 3), "flat": torch.full((200, 4), 2.5), "b": normal(200, 3, seed=1)}
        with pytest.warns(UserWarning) as caught:
            push(scorer("cka", "procrustes", "mutual_knn", null=2), rows).scored()
        assert [str(warning.message).partition(";")[0] for warning in caught] == [
            "cka, procrustes: NaN for 'flat'",
            "199 rows of 'flat' repeat earlier ones, as rows do after identical prefixes",
        ]

    @pytest.mark.parametrize("name", ["cca", "pwcca", "linear_regression"])
    def test_fewer_rows_than_columns_give_no_perfect_correlation(self, name):
        rows = {"a": normal(30, 40), "b": normal(30, 45, seed=1)}
        with pytest.warns(UserWarning, match=f"{name}: NaN for 'a', 'b'; .* too few for so many columns"):
            assert push(scorer(name), rows).scored()[name].score[0, 1].isnan()

    def test_a_wide_layer_takes_the_score_of_its_pairs_only(self):
        rows = {"wide": normal(60, 80), "a": normal(60, 5, seed=1), "b": normal(60, 6, seed=2)}
        found = push(scorer("cca"), rows).scored()["cca"].score
        assert found[0, 1:].isnan().all() and found[1:, 0].isnan().all() and found[1:, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory_budget": -1}, "memory_budget counts bytes .* got -1"),
        ({"memory_budget": True}, "memory_budget counts bytes .* got True"),
        ({"memory_budget": "2 GB"}, "memory_budget counts bytes .* got '2 GB'"),
        ({"memory_budget": float("nan")}, "memory_budget counts bytes .* got nan"),
        ({"null": True}, "null counts permutations"),
        ({"groups": 1}, "groups of rows .* from 3 on, got 1"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(ConfigError, match=said):
        LayerScoring("0", **options)
    with pytest.raises(ConfigError, match=said):
        scorer("cka", **options)


UNSUPERVISED = [name for name in registry.names() if registry.get(name).spec.kind != "supervised"]


@pytest.mark.parametrize("name", UNSUPERVISED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_is_not_finite_is_named_as_that_and_once(name, value):
    rows = {"a": normal(200, 3), "broken": normal(200, 3, seed=1).index_fill(0, torch.tensor([3]), value)}
    with pytest.warns(UserWarning) as caught:
        found = push(scorer(name, null=2, groups=3), rows).scored()[name].score
    said = "'broken' held NaN or infinite values; scores that involve them are NaN"
    assert [str(warning.message) for warning in caught] == [said]
    assert found.isnan().any() and not found.isnan().all()


PAIRS = [name for name in registry.names() if registry.get(name).spec.kind == "pair"]


@pytest.mark.parametrize("name", PAIRS)
def test_related_layers_are_more_alike_than_any_of_their_permutations(name):
    x = normal(120, 4)
    rows = {"a": x, "b": x @ normal(4, 4, seed=1) + 0.1 * normal(120, 4, seed=2)}
    p = push(scorer(name, null=9, groups=0, portion=120), rows, size=120).scored()[name].null.p
    assert float(p[0, 1]) == float(p[1, 0]) == pytest.approx(0.1)
