"""Online coding: closed forms, the code of Bayes, and layers that are easier or harder to learn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tdprobe.errors import TdprobeError
from tdprobe.latent import LinearEstimator, MdlEstimator
from tdprobe.latent.information import online_codelength
from tdprobe.latent.information.mdl import FRACTIONS


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequential_code(counts):
    """Return the bits of the sequence with these counts by the estimator of Krichevsky and Trofimov, in any order."""
    k, n = len(counts), sum(counts)
    logs = [math.lgamma(c + 0.5) - math.lgamma(0.5) for c in counts]
    return -(sum(logs) - math.lgamma(n + k / 2) + math.lgamma(k / 2)) / math.log(2)


@pytest.mark.parametrize("counts", [(6, 6), (1, 11), (3, 4, 5)])
def test_rows_that_say_nothing_are_coded_by_counting(counts):
    # Row by row, with rows that are all alike: only the shares of the classes can be learned.
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    n = len(y)
    code = online_codelength(torch.ones(n, 2), y, fractions=[(i + 1) / n for i in range(n)], seed=3)
    assert code.ends == tuple(range(1, n + 1)) and code.uniform == pytest.approx(n * math.log2(len(counts)))
    assert code.blocks[0] == pytest.approx(math.log2(len(counts)))
    assert code.online == pytest.approx(sequential_code(counts), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
def test_independent_labels_cost_what_they_cost_without_the_layer(classes):
    code = online_codelength(normal(2000, 10), torch.arange(2000) % classes)
    assert code.uniform == pytest.approx(2000 * math.log2(classes))
    # Learning that there is nothing to learn costs at most half a logarithm of n for each weight.
    weights = 11 * (classes - 1)
    assert -4 * code.se < code.online - code.uniform < 4 * code.se + weights / 2 * math.log2(2000)
    assert code.compression == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize(("distance", "information"), [(1, 0.111421482183), (4, 0.632720193728)])
def test_gaussian_classes_come_near_the_code_of_bayes(distance, information):
    y = torch.arange(4000) % 2
    code = online_codelength(normal(4000, 1) + distance * y[:, None], y)
    best = 4000 * (1 - information / math.log(2))
    # Half a logarithm of n for each of two weights, and the first blocks, come on top.
    assert best - 4 * code.se < code.online < best + 4 * code.se + 30


def test_classes_that_lie_apart_are_nearly_free():
    y = torch.arange(1000) % 4
    code = online_codelength(8 * torch.eye(4)[y] + normal(1000, 4), y)
    assert code.compression > 20 and sum(code.blocks[-2:]) < 10
    assert code.online == pytest.approx(sum(code.blocks)) and code.ends == (1, 2, 4, 8, 16, 32, 63, 125, 250, 500, 1000)


def test_what_is_harder_to_learn_costs_more_though_both_can_be_learned():
    y = torch.arange(1000) % 2
    clear = 6.0 * y[:, None] + normal(1000, 1)
    plain = online_codelength(torch.cat([clear, normal(1000, 3, seed=1)], 1), y)
    hidden = online_codelength(torch.cat([clear, normal(1000, 200, seed=1)], 1), y)
    assert hidden.blocks[-1] < 50 and hidden.online > 1.5 * plain.online


def test_the_seed_orders_rows_and_nothing_else_does():
    x, y = normal(100, 3), torch.arange(100) % 2
    x = x + y[:, None]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    code = online_codelength(x, y)
    assert online_codelength(x[order], y[order]).online == pytest.approx(code.online, rel=1e-9)
    assert online_codelength(x, y, seed=1).online != pytest.approx(code.online, rel=1e-3)


def test_probes_that_torch_trains():
    y = torch.arange(400) % 2
    x = normal(400, 3) + 3 * y[:, None]

    def make(d, k):
        return LinearEstimator(d, num_classes=k, epochs=200, batch_size=32, lr=1e-2)

    options = {"fractions": (0.25, 0.5, 1.0)}
    ours, linear = online_codelength(x, y, probe=make, **options), online_codelength(x, y, **options)
    assert ours.blocks[0] == linear.blocks[0] == 100
    assert ours.online == pytest.approx(linear.online, rel=0.25)


class TestEstimator:
    def test_measures_are_those_of_the_function(self):
        x = normal(80, 4)
        labels = torch.stack([(x[:, 0] > 0).long(), torch.arange(80) % 3], 1)
        codes = [online_codelength(x, y) for y in labels.T]
        for measure, expected in (("compression", 0), ("codelength", 1)):
            estimator = MdlEstimator(measure=measure)
            statistic = estimator.statistic()
            state = statistic.init([x, labels.double()], torch.arange(80))
            scores = estimator.score(statistic.update(state, [x, labels.double()], torch.arange(80)))
            values = [(c.compression, c.online)[expected] for c in codes]
            assert scores["score"][0].tolist() == pytest.approx(values, rel=1e-9)
            relative = [c.se / c.online for c in codes]
            assert (scores["se"] / scores["score"])[0].tolist() == pytest.approx(relative, rel=1e-9)

    def test_the_error_is_the_spread_over_samples(self):
        y, found = torch.arange(300) % 2, []
        for seed in range(30):
            code = online_codelength(normal(300, 1, seed=seed) + 2 * y[:, None], y, fractions=(0.2, 0.5, 1))
            found.append((code.online, code.se))
        online, se = np.array(found).T
        assert 0.6 < se.mean() / online.std() < 1.6

    def test_a_single_class_needs_no_bits(self):
        x, y = normal(20, 2), torch.ones(20)
        code = online_codelength(x, y)
        assert code.online == code.uniform == 0 and math.isnan(code.compression)
        with pytest.warns(UserWarning, match="mdl: 'labels' is NaN"):
            assert MdlEstimator()(TensorDict({"data": x, "labels": y}))["mdl"].isnan().all()

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda x, y: MdlEstimator(measure="compress"), "did you mean 'compression'"),
            (lambda x, y: MdlEstimator(fractions=(0.5,)), "two or more, up to 1.0"),
            (lambda x, y: MdlEstimator(fractions=(0.5, 0.4, 1.0)), "ascending"),
            (lambda x, y: online_codelength(x, y, fractions=(0.1, 0.5)), "up to 1.0"),
            (lambda x, y: online_codelength(x, y / 2), "integer labels"),
            (lambda x, y: online_codelength(x[:3], y[:3]), "got 3 rows.*takes 4 rows"),
            (lambda x, y: MdlEstimator(probe=0), "probe=0"),
        ],
    )
    def test_bad_arguments_are_refused(self, call, message):
        with pytest.raises(ValueError, match=message) as caught:
            call(normal(20, 3), torch.arange(20) % 2)
        assert isinstance(caught.value, TdprobeError)

    def test_the_default_fractions_are_those_of_the_paper(self):
        assert [round(100 * share, 4) for share in FRACTIONS] == [
            0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50, 100,
        ]  # fmt: skip
