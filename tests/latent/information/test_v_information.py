"""V-information: classes whose information is known, a plain loop, other families, a sentence encoder."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdprobe.errors import TdprobeError
from tdprobe.latent import LayerScoring, LinearEstimator, TorchEstimator, VInformationEstimator
from tdprobe.latent.information import pointwise_v_information, v_information


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def within(values, expected, errors=4.0):
    return abs(values.mean() - expected) < errors * values.std() / len(values) ** 0.5


class TestKnownInformation:
    @pytest.mark.parametrize(
        ("distance", "information"), [(1, 0.111421482183), (2, 0.336830820343), (4, 0.632720193728)]
    )
    def test_two_unit_gaussians_whose_best_predictor_is_linear(self, distance, information):
        y = torch.arange(4000) % 2
        gains = pointwise_v_information(normal(4000, 1) + distance * y[:, None], y)
        assert within(gains, information)

    @pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 0.99])
    def test_correlated_gaussians(self, rho):
        x, noise = normal(2, 4000)
        gains = pointwise_v_information(x[:, None], rho * x + (1 - rho**2) ** 0.5 * noise, discrete=False)
        # What fitting costs is a few parts in n.
        assert abs(gains.mean() + 0.5 * math.log(1 - rho**2)) < 4 * gains.std() / 4000**0.5 + 2e-3

    @pytest.mark.parametrize("classes", [2, 4])
    def test_classes_that_lie_apart_are_known_entirely(self, classes):
        y = torch.arange(400) % classes
        found = v_information(10 * torch.eye(classes)[y] + normal(400, classes), y)
        assert 0.98 * math.log(classes) < found < math.log(classes) + 0.01

    @pytest.mark.parametrize("discrete", [True, False])
    @pytest.mark.parametrize("width", [2, 300])
    def test_overfitting_is_no_information(self, width, discrete):
        # 200 rows of 300 columns can be told apart without error, in any way.
        x, y = normal(200, width), torch.arange(200) % 2 if discrete else normal(200, seed=1)
        assert -0.1 < v_information(x, y, discrete) < 0.06

    def test_the_family_decides(self):
        class TwoLayers(TorchEstimator):
            def __init__(self, d, k):
                super().__init__(num_classes=k, epochs=60, lr=1e-2)
                self.net = nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, k))

            def forward(self, x):
                return self.net(x)

        x = torch.where(normal(800, 2) > 0, 1.0, -1.0) + 0.2 * normal(800, 2, seed=1)
        either = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
        assert abs(v_information(x, either)) < 0.02
        state = torch.get_rng_state()
        found = v_information(x, either, probe=TwoLayers)
        assert 0.6 < found < math.log(2) and torch.equal(state, torch.get_rng_state())
        assert found == v_information(x, either, probe=TwoLayers)

    @pytest.mark.skipif(torch.cuda.is_initialized(), reason="seeds wait only for a GPU that nobody has used yet")
    def test_the_seed_of_a_gpu_that_is_used_later_is_the_users(self):
        def make(d, k):
            return LinearEstimator(d, num_classes=k, epochs=1)

        torch.manual_seed(42)
        waiting = torch.cuda._lazy_seed_tracker.get_calls()
        v_information(normal(40, 2), torch.arange(40) % 2, probe=make)
        assert torch.cuda._lazy_seed_tracker.get_calls() == waiting

    def test_a_probe_of_ours_comes_near_the_default(self):
        y = torch.arange(600) % 2
        x, numbers = normal(600, 3) + 2 * y[:, None], normal(600, 3) @ torch.tensor([1.0, 2, 0]).double()

        def make(d, k):
            return LinearEstimator(d, num_classes=k, epochs=60, lr=1e-2)

        assert v_information(x, y, probe=make) == pytest.approx(v_information(x, y), abs=0.03)
        noisy = numbers + normal(600, seed=2)
        given = normal(600, 3), noisy, False
        assert v_information(*given, probe=make) == pytest.approx(v_information(*given), abs=0.05)


def by_loops(x, y, folds, ridges):
    """Leave out each row for each penalty, as in the definition."""
    rank = np.empty(len(y), dtype=int)
    rank[np.argsort(y)] = np.arange(len(y))

    def fitted(x, y, alpha):
        mean, centre = x.mean(0), y.mean()
        xc = x - mean
        w = np.linalg.solve(xc.T @ xc + alpha * np.eye(x.shape[1]), xc.T @ (y - centre))
        return lambda z: (z - mean) @ w + centre

    found = np.empty(len(y))
    for fold in range(folds):
        fit, held = rank % folds != fold, rank % folds == fold
        z = (x - x[fit].mean(0)) / x[fit].std(0)
        a, b, n = z[fit], y[fit], fit.sum()
        others = [np.arange(n) != i for i in range(n)]
        errors = [
            np.mean([(b[i] - fitted(a[o], b[o], alpha * n)(a[i])) ** 2 for i, o in enumerate(others)])
            for alpha in ridges
        ]
        guess = fitted(a, b, ridges[int(np.argmin(errors))] * n)(z[held])
        blind = np.mean([(b[i] - b[o].mean()) ** 2 for i, o in enumerate(others)])
        densities = [
            -0.5 * np.log(2 * np.pi * v) - (y[held] - m) ** 2 / (2 * v)
            for m, v in ((guess, min(errors)), (b.mean(), blind))
        ]
        found[held] = densities[0] - densities[1]
    return found


def test_numbers_are_a_gaussian_around_ridge_regression_by_plain_loops():
    x, y = normal(30, 3).numpy() * [1, 5, 0.2] + 7, normal(30, seed=1).numpy()
    y = y + x[:, 0]
    expected = by_loops(x, y, 3, 10.0 ** np.arange(-5, 3))
    np.testing.assert_allclose(pointwise_v_information(x, y, False, folds=3), expected, rtol=1e-7)


class TestRows:
    def test_a_wrong_label_counts_against_it(self):
        y = torch.arange(200) % 2
        x, wrong = 6.0 * y[:, None] + normal(200, 1), y.clone()
        wrong[17] = 1 - wrong[17]
        gains = pointwise_v_information(x, wrong)
        assert gains[17] < -1 and int((gains < -1).sum()) == 1
        assert v_information(x, wrong) == pytest.approx(gains.mean().item(), abs=1e-12)

    def test_order_names_of_classes_and_kind_of_array_do_not_matter(self):
        y = torch.arange(120) % 3
        x = torch.eye(3)[y].double() + normal(120, 3)
        gains, order = pointwise_v_information(x, y), torch.randperm(120, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(pointwise_v_information(x[order], y[order]), gains[order])
        assert torch.equal(pointwise_v_information(x.numpy(), 2 * y.numpy() - 7), gains)

    def test_a_class_of_one_row_is_no_infinite_surprise(self):
        x, y = normal(50, 2), torch.arange(50) % 2
        y[3] = 7
        # It is never among the rows to fit to while it is held out: (0 + 1/2) / (40 + 3/2), seen or not.
        assert pointwise_v_information(x, y)[3].item() == pytest.approx(0, abs=1e-12)

    def test_labels_that_never_change_say_nothing(self):
        x = normal(20, 2)
        assert v_information(x, torch.ones(20)) == 0
        assert math.isnan(v_information(x, torch.ones(20), discrete=False))


class TestEstimator:
    def test_each_column_is_the_function_and_its_error_the_spread(self):
        x = normal(90, 4)
        labels = torch.stack([(x[:, 0] > 0).long(), torch.arange(90) % 3], 1)
        estimator = VInformationEstimator(folds=3)
        found = estimator(TensorDict({"data": x, "labels": labels}))["v_information"]
        gains = [pointwise_v_information(x, y, folds=3) for y in labels.T]
        torch.testing.assert_close(found.double(), torch.stack(gains).mean(1), rtol=1e-6, atol=1e-7)
        statistic = estimator.statistic()
        state = statistic.init([x, labels.double()], torch.arange(90))
        state = statistic.update(state, [x, labels.double()], torch.arange(90))
        se = estimator.score(state)["se"][0]
        torch.testing.assert_close(se, torch.stack(gains).std(1) / 90**0.5)

    def test_numbers_and_classes_in_several_keys(self):
        x = normal(60, 3)
        td = TensorDict({"data": x, "size": x[:, 0] + normal(60, seed=1), "kind": (x[:, 1] > 0).long()})
        estimator = VInformationEstimator(labels=["size", "kind"], discrete=[False, True])
        expected = [v_information(x, td["size"], False), v_information(x, td["kind"])]
        assert estimator(td)["v_information"].tolist() == pytest.approx(expected, rel=1e-5)
        assert "labels=['size', 'kind']" in repr(estimator) and "probe=None" in repr(estimator)

    def test_constant_numbers_are_named(self):
        td = TensorDict({"data": normal(20, 2), "labels": torch.ones(20)})
        with pytest.warns(UserWarning, match="v_information: 'labels' is NaN in some layer, for it is constant"):
            assert VInformationEstimator(discrete=False)(td)["v_information"].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: v_information(x[:9], y[:9]), "got 9 rows.*takes 10 rows"),
        (lambda x, y: v_information(x, y[:5]), "x has 20 samples and y has 5"),
        (lambda x, y: v_information(x, torch.stack([y, y], 1)), "y has 2 columns; give one label per row"),
        (lambda x, y: v_information(x, y + 0.5), "holds 0.5, but discrete attributes are integer labels"),
        (lambda x, y: v_information(x / 0, y), "x holds NaN or infinite"),
        (lambda x, y: v_information(x, y, folds=1), "folds=1; allowed are integers from 2"),
        (lambda x, y: v_information(x, y, probe=3), "probe=3; allowed are None"),
        (lambda x, y: VInformationEstimator(probe="linear"), "probe='linear'; allowed are None"),
        (lambda x, y: VInformationEstimator(folds=True), "folds=True"),
        (lambda x, y: VInformationEstimator(bank_size=0), "size=0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(normal(20, 3), torch.arange(20) % 2)
    assert isinstance(caught.value, TdprobeError)


def test_sentiment_by_layer_of_an_encoder(minilm):
    from tdprobe import hf

    model, tokenizer = minilm
    rated = [row for row in hf.demo_corpus() if abs(row["score"]) >= 1.5 and len(row["text"]) < 70][:160]
    labels = torch.tensor([int(row["score"] > 0) for row in rated])
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    names = {"v_information": "v_information", "mdl": "mdl", "control": VInformationEstimator(labels="shuffled")}
    scoring = LayerScoring(r"encoder\.layer\.[05]$", names, tokens="mean", skip_first=0)
    with torch.no_grad(), scoring.prepare(model) as hooked:
        for start in range(0, len(rated), 80):
            part = slice(start, start + 80)
            (batch,) = hf.batches([row["text"] for row in rated[part]], tokenizer, batch_size=80)
            hooked(batch.inputs, labels=labels[part], shuffled=shuffled[part])
    table = hooked.hooking_context.scores()
    information, control = (table.block(name).values[:, 0] for name in ("v_information", "control"))
    shares = labels.bincount().double() / len(labels)
    entropy = -float((shares * shares.log()).sum())
    # Most of the verdict of people can be read off the encoder by a line, and nothing of a shuffled one.
    assert (information > 0.2).all() and (information < entropy).all() and (control < 0.05).all()
    block = table.block("mdl")
    assert (block.values > 1.1).all() and (block.se > 0).all() and block.layers_b == ("labels",)
