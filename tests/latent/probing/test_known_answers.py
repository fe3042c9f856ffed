"""Tasks whose answer is known before anything is fitted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from probing_tools import KEYS, accuracy
from tdprobe.contexts import CompositeHookingContextFactory
from tdprobe.latent import (
    ActivationCaching,
    BilinearEstimator,
    BilinearProbeManager,
    LinearEstimator,
    LowRankBilinearEstimator,
    MeanDifferenceClassifier,
    ProbeManager,
    Probing,
)

N, WIDTH = 1200, 6


class TwoHalves(nn.Module):
    """Two layers that read one half of the input each: neither knows the sign of the product of both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH)

    def forward(self, input: Tensor) -> Tensor:
        return self.left(input[:, :4]) + self.right(input[:, 4:])


@pytest.fixture(scope="module")
def task() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model, inputs and labels that are 1 where two independent fair signs agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = TwoHalves(), 0.5 * torch.randn(N, 8)
        x[:, [0, 4]] = 2.0 * torch.randint(0, 2, (N, 2)) - 1
    return model, x, (x[:, 0] * x[:, 4] > 0).long()


def run(manager: ProbeManager, pattern: str, task: Any) -> dict[str, float]:
    model, x, y = task
    torch.manual_seed(0)
    with Probing(pattern, manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
        hooked(x[: N // 2], labels=y[: N // 2], step_type="fit")
        hooked(x[N // 2 :], labels=y[N // 2 :], step_type="predict")
    return {key: metrics["accuracy"] for key, metrics in manager.predict_metrics.items()}


# An accuracy on 600 fair labels has a standard deviation of 0.5 / sqrt(600) = 0.0204; chance is within 4 of them.
CHANCE = pytest.approx(0.5, abs=0.082)


def test_linear_probes_cannot_tell_a_product(task: Any) -> None:
    manager = ProbeManager(LinearEstimator, {"d_latent": WIDTH, "num_classes": 2, "epochs": 30, "lr": 0.03}, accuracy)
    found = run(manager, "left|right", task)
    assert found == {"left_fwd": CHANCE, "right_fwd": CHANCE}


def test_not_even_a_linear_probe_of_both_layers_together(task: Any) -> None:
    model, x, y = task
    both = torch.cat([model.left(x[:, :4]), model.right(x[:, 4:])], 1).detach().numpy()
    probe = LogisticRegression().fit(both[: N // 2], y[: N // 2])
    assert probe.score(both[N // 2 :], y[N // 2 :]) == CHANCE


@pytest.mark.parametrize("kind", [BilinearEstimator, LowRankBilinearEstimator])
def test_bilinear_probes_tell_it(task: Any, kind: Any) -> None:
    options = {"d_latent1": WIDTH, "d_latent2": WIDTH, "num_classes": 2, "epochs": 150, "lr": 0.03}
    pairs = [("left", "right"), ("left", "left"), ("right", "right")]
    manager = BilinearProbeManager(pairs, kind, options, accuracy)
    found = run(manager, manager.key_pattern, task)
    assert found["left_right_fwd"] > 0.95
    # A form in one layer alone is as blind as a linear probe.
    assert found["left_left_fwd"] == CHANCE and found["right_right_fwd"] == CHANCE


def test_estimators_of_scikit_learn_and_mean_differences_as_probes(task: Any) -> None:
    model, x, _ = task
    labels = (x[:, 0] > 0).long()
    for kind, options in ((LogisticRegression, {"C": 100.0}), (MeanDifferenceClassifier, {})):
        manager = ProbeManager(kind, options, lambda p, y: accuracy(torch.as_tensor(p), y))
        found = run(manager, "left|right", (model, x, labels))
        # The left layer holds the sign (it is injective), the right one has never seen it.
        assert found["left_fwd"] > 0.85 and found["right_fwd"] == CHANCE


def test_a_probe_is_the_estimator_on_the_cached_rows(task: Any) -> None:
    model, x, _ = task
    labels = (x[:, 0] > 0).long()
    manager = ProbeManager(LogisticRegression, {}, lambda p, y: accuracy(torch.as_tensor(p), y))
    run(manager, "left", (model, x, labels))
    reference = LogisticRegression().fit(model.left(x[: N // 2, :4]).detach().numpy(), labels[: N // 2].numpy())
    np.testing.assert_allclose(manager.estimators["left_fwd"].coef_, reference.coef_, rtol=1e-3)


def test_probes_compose_with_caching(task: Any) -> None:
    model, x, _ = task
    labels = (x[:, 0] > 0).long()
    manager = ProbeManager(MeanDifferenceClassifier, {}, accuracy)
    probing = Probing("left", manager.probe_factory, additional_keys=KEYS)
    for factories in ((probing, ActivationCaching("left")), (ActivationCaching("left"), probing)):
        manager.reset_estimators()
        manager.reset_metrics()
        with CompositeHookingContextFactory(*factories).prepare(model) as hooked:
            hooked(x, labels=labels, step_type="fit")
        classifier = MeanDifferenceClassifier()
        classifier.fit(hooked.hooking_context.cache["left"], labels)
        assert (manager.estimators["left_fwd"].coef_ == classifier.coef_).all()
