"""Sums of kernels over pairs of rows: in any tiles, in bounded memory, once for all estimators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_tools as plain
from tdprobe.latent import CkaEstimator, CknnaEstimator, DistanceCorrelationEstimator, LayerScoring, RsaEstimator
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.scorer import Scorer
from tdprobe.stats import Kernel, Kernels
from tdprobe.stats import kernel_layer as rows_module
from tdprobe.stats import kernels as kernels_module
from tdprobe.stats import precision as precision_module
from tdprobe.stats import rank_table as table_module
from tdprobe.stats.kernel_layer import Fitted, Rows, median
from tdprobe.stats.kernel_rows import KernelRows
from tdprobe.stats.pair_sums import PairSums
from tdprobe.stats.rank_table import RankTable
from tdprobe.stream.batch import Batch

ALL = (
    Kernel("gram"),
    Kernel("rbf"),
    Kernel("rbf", threshold=0.5),
    Kernel("distance"),
    Kernel("square", "unit"),
    Kernel("square", "standard", ranks=True),
)


def scores(table):
    ways = (PairSums.correlation, PairSums.cosine, lambda s: s.alignment(True), lambda s: s.alignment(False))
    return torch.stack([way(found) for found in table.sums.values() for way in ways])


class TestTiles:
    @pytest.mark.parametrize(("block", "budget"), [(3, 1), (7, 20_000), (16, 1), (1000, 2**26)])
    def test_their_size_changes_nothing(self, monkeypatch, block, budget):
        rows = [*plain.related(75), plain.related(75, seed=1)[0]]
        whole = Kernels(ALL).of_rows(rows)
        monkeypatch.setattr(kernels_module, "BLOCK", block)
        monkeypatch.setattr(kernels_module, "BUDGET", budget)
        parts = Kernels(ALL).of_rows(rows)
        torch.testing.assert_close(scores(parts), scores(whole), rtol=1e-11, atol=1e-13)
        for kernel in ALL:
            torch.testing.assert_close(parts.sums[kernel].products, whole.sums[kernel].products, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("n", [2, 3, 8, 9, 30])
    def test_groups_add_up_to_all_pairs_and_to_all_rows(self, n):
        x, y = plain.related(n)
        found = Kernels((Kernel("square"),)).of_rows([x, y]).sums[Kernel("square")]
        whole = found.products.sum((0, 1))[0, 1]
        # The products are of shifted values: undo that by hand.
        u, v = found.shift
        a, b = (
            torch.from_numpy(plain.euclidean(z)) ** 2 * factor(z, s) for z, s in zip((x, y), found.spread, strict=True)
        )
        a, b = a - u - u.unsqueeze(1), b - v - v.unsqueeze(1)
        off = ~torch.eye(n, dtype=torch.bool)
        assert float(whole) == pytest.approx(float((a * b)[off].sum()), rel=1e-9, abs=1e-9)
        torch.testing.assert_close(found.sums.sum(0)[0], (a * off).sum(1), rtol=1e-9, atol=1e-9)
        assert torch.equal(found.group, found.group.sort().values) and len(found.group) == n

    def test_without_a_group_equals_the_other_rows_alone(self):
        x, y = plain.related(41)
        kernels = (Kernel("gram"), Kernel("distance"), Kernel("square", "unit"))
        table = Kernels(kernels).of_rows([x, y])
        for kernel in kernels:
            found, group = table.sums[kernel], table.sums[kernel].group
            alone = Kernels((kernel,)).of_rows([x[group != 3], y[group != 3]]).sums[kernel]
            # Inner products depend on the mean of the rows, until they are doubly centred.
            if kernel.form != "gram":
                torch.testing.assert_close(found.without(3).correlation()[0, 1], alone.correlation()[0, 1])
            for unbiased in (True, False):
                torch.testing.assert_close(found.without(3).alignment(unbiased), alone.alignment(unbiased))

    def test_no_matrix_of_all_pairs_is_ever_made(self, monkeypatch):
        n, sizes = 4000, []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **kwargs or {})
                sizes.extend(
                    x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if hasattr(x, "numel")
                )
                return out

        monkeypatch.setattr(kernels_module, "BUDGET", 2**20)
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
        with Sizes():
            Kernels((*ALL, Kernel("distance", ranks=True))).of_rows([x, x.square()])
            CknnaEstimator()._one_shot(Batch({"a": x}, torch.arange(n)))
        assert max(sizes) <= rows_module.SAMPLE**2 + 1 < n * n / 8


def factor(z, spread):
    """Return by how much squared distances are scaled."""
    own = float((z - z.mean(0)).square().sum())
    return float(spread) / own if own else 1.0


class TestRanks:
    def data(self, kind, n=1300):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(n, 5, generator=g, dtype=torch.float64)
        return {
            "ordinary": x,
            "tied": x.round(),
            "binary": x.sign(),
            "clustered": x * 0.3 + 10 * (torch.arange(n) % 3).unsqueeze(1),
            "heavy tails": x / torch.rand(n, 1, generator=g, dtype=torch.float64),
            "repeated": x[torch.arange(n) % 300],
            "wide": torch.randn(n, 250, generator=g, dtype=torch.float64),
        }[kind]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", ["ordinary", "tied", "binary", "clustered", "heavy tails", "repeated", "wide"])
    def test_bins_agree_with_a_sort(self, kind, dtype):
        x = self.data(kind)
        rows = Rows(x.to(dtype), "plain", dtype, torch.device("cpu"))
        square = rows.between(slice(None), slice(None))[1]
        above = torch.ones_like(square, dtype=torch.bool).triu_(1)
        exact = plain.mid_ranks((torch.from_numpy(plain.euclidean(x)) ** 2)[above].numpy()) - 0.5
        found = RankTable(rows).ranks(square, torch.empty_like(square))[above].double().numpy() + 0.5
        # In float32 the distances within a cluster are only known to some digits.
        known = 1e-3 if dtype == torch.float32 and kind == "clustered" else 1e-4
        assert np.sqrt(np.square(found - exact / len(exact)).mean()) < known
        assert found.mean() == pytest.approx(0.5, abs=1e-6)

    def test_the_score_moves_by_less_than_is_said(self, monkeypatch):
        x, y = plain.related(900)
        exact = Kernels((ALL[-1],)).of_rows([x, y]).sums[ALL[-1]].correlation()
        monkeypatch.setattr(rows_module, "SAMPLE", 200)
        monkeypatch.setattr(table_module, "BINS", 1000)
        binned = Kernels((ALL[-1],)).of_rows([x, y]).sums[ALL[-1]].correlation()
        assert not torch.equal(exact, binned)
        torch.testing.assert_close(binned, exact, rtol=0, atol=1e-5)


class TestMedian:
    def test_is_numpys_over_pairs_that_differ(self):
        for n in (2, 3, 4, 50):
            x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
            rows = Rows(torch.cat([x, x[:1]]), "plain", torch.float64, torch.device("cpu"))
            square = plain.euclidean(torch.cat([x, x[:1]])) ** 2 * factor(torch.cat([x, x[:1]]), rows.spread)
            pairs = square[np.triu_indices(n + 1, 1)]
            assert median(rows.sample()) == pytest.approx(np.median(pairs[pairs > 0]), rel=1e-12)

    def test_many_rows_are_sampled_evenly(self):
        x = torch.randn(3000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rows = Rows(x, "plain", torch.float64, torch.device("cpu"))
        few = Rows(x[torch.arange(1024) * 3000 // 1024], "plain", torch.float64, torch.device("cpu"))
        ratio = factor(x, rows.spread) / factor(few.points, few.spread)
        assert len(rows.sample()) == 1024 * 1023 // 2
        assert median(rows.sample()) / factor(x, rows.spread) == pytest.approx(
            float(np.median((plain.euclidean(x[torch.arange(1024) * 3000 // 1024]) ** 2)[np.triu_indices(1024, 1)])),
            rel=1e-9,
        )
        assert ratio > 0


def test_products_are_in_float64_where_float32_would_be_tf32(monkeypatch):
    x, y = (z.float() for z in plain.related(60))
    exact = Kernels(ALL).of_rows([x.double(), y.double()])
    monkeypatch.setattr(precision_module, "float32_is_exact", lambda device: False)
    torch.testing.assert_close(scores(Kernels(ALL).of_rows([x, y])), scores(exact), rtol=1e-9, atol=1e-12)
    monkeypatch.undo()
    assert precision_module.float32_is_exact(torch.device("cpu"))


class TestOnePass:
    MEASURES = (
        CkaEstimator(kernel="rbf", mode="robust"),
        CkaEstimator(bank_size=4096),
        DistanceCorrelationEstimator(),
        RsaEstimator(),
        RsaEstimator(rdm="euclidean", comparison="pearson"),
    )

    @pytest.fixture
    def passes(self, monkeypatch):
        """List every walk over a bank."""
        made, run = [], Kernels.of_rows
        monkeypatch.setattr(Kernels, "of_rows", lambda self, rows: made.append(self) or run(self, rows))
        return made

    def test_estimators_share_it_and_score_as_they_do_alone(self, passes):
        x, y = plain.related(200)
        estimators = resolve_estimators(self.MEASURES)
        scorer = Scorer(estimators, portion=32, max_norm=None)
        for part in torch.arange(200).split(50):
            scorer.push(Batch({"a": x[part], "b": y[part]}, part))
        found, states = scorer.scored(), scorer.states()
        assert len(passes) == 1 and len(passes[0].kernels) == 4
        for label, estimator in estimators.items():
            alone = estimator.score(states[label])
            torch.testing.assert_close(found[label].score, alone["score"], rtol=1e-12, atol=0)
            torch.testing.assert_close(found[label].se, alone["se"], rtol=1e-9, atol=1e-12)

    def test_a_language_model(self, smollm2, passes):
        from tdprobe import hf

        model, tokenizer = smollm2
        texts = [text for text in hf.read_texts("demo") if len(text) < 100][:24]
        scoring = LayerScoring(r"model\.layers\.\d+$", [*self.MEASURES, "cknna", "distance_correlation"])
        with scoring.prepare(model) as hooked, torch.no_grad():
            for batch in hf.batches(texts, tokenizer, batch_size=8, max_length=32):
                hooked(**batch.inputs)
        table = hooked.hooking_context.scores()
        assert len(passes) == 1
        for name in table.estimators:
            matrix = table.matrix(name)
            assert matrix.shape == (30, 30) and np.isfinite(matrix).all()
            np.testing.assert_allclose(np.diagonal(matrix), 1, atol=1e-9)
            # Neighbouring layers are alike, the first and the last but one are not.
            assert np.median(np.diagonal(matrix, 1)) > 0.8 > matrix[0, -2], name


@pytest.mark.parametrize("n", [9, 10, 1500])
def test_both_ways_to_a_kernel_matrix_share_one_rule_for_the_bandwidth(n):
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = x[torch.arange(min(n, 1024)) * n // min(n, 1024)]
    middle = np.median(torch.pdist(chosen).square())
    expected = float(torch.exp(-(x[0] - x[1]).square().sum() / (2 * 0.49 * middle)))
    pair = torch.tensor([0]), torch.tensor([1])
    assert float(KernelRows(x, "rbf", 0.7).block(*pair)) == pytest.approx(expected, rel=1e-9)
    fitted = Fitted(Kernel("rbf", threshold=0.7), Rows(x, "plain", torch.float64, x.device))
    assert math.exp(fitted.factor * float(fitted.rows.between(*pair)[1])) == pytest.approx(expected, rel=1e-9)
