"""Human sentiment scores, read from a real encoder by every kind of probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from probing_tools import KEYS, accuracy
from tdprobe import hf
from tdprobe.latent import ActivationCaching, LinearEstimator, MeanDifferenceClassifier, ProbeManager, Probing


@pytest.fixture(scope="module")
def sentences(minilm: tuple[nn.Module, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Return 200 short sentences with a clear score, tokenized, and whether the score is positive."""
    rows = [row for row in hf.demo_corpus() if abs(row["score"]) >= 1 and len(row["text"]) < 90]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:200].tolist()]
    (batch,) = hf.batches([row["text"] for row in rows], minilm[1], batch_size=200)
    return batch.inputs, torch.tensor([int(row["score"] > 0) for row in rows])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (lambda: make_pipeline(StandardScaler(), RidgeClassifier(300.0)), {}),
        (MeanDifferenceClassifier, {}),
        (LinearEstimator, {"d_latent": 384, "num_classes": 2, "epochs": 30}),
    ],
)
def test_every_kind_of_probe_reads_sentiment_from_an_encoder(
    minilm: tuple[nn.Module, Any], sentences: Any, kind: Any, options: dict[str, Any]
) -> None:
    inputs, labels = sentences
    manager = ProbeManager(kind, options, lambda p, y: accuracy(torch.as_tensor(p), y))
    pattern = r"encoder\.layer\.\d+$"
    probing = Probing(pattern, manager.probe_factory, additional_keys=KEYS, tokens="mean", early_stop=True)
    torch.manual_seed(0)
    with torch.inference_mode(), probing.prepare(minilm[0]) as hooked:
        for step_type, rows in (("fit", slice(0, 120)), ("predict", slice(120, None))):
            hooked({name: x[rows] for name, x in inputs.items()}, labels=labels[rows], step_type=step_type)
    scores = [metrics["accuracy"] for metrics in manager.predict_metrics.values()]
    # 80 test sentences: a coin has a standard deviation of 0.056, so 0.7 is more than three of them above chance.
    assert len(scores) == 6 and min(scores) > 0.7


def test_probes_see_the_rows_that_caching_sees(minilm: tuple[nn.Module, Any], sentences: Any) -> None:
    inputs, labels = sentences
    manager, layer = ProbeManager(MeanDifferenceClassifier, {}, accuracy), "encoder.layer.3"
    probing = Probing(rf"{layer}$", manager.probe_factory, additional_keys=KEYS, tokens="last")
    with torch.no_grad(), ActivationCaching(rf"{layer}$", tokens="last").prepare(minilm[0]) as cached:
        with probing.prepare(minilm[0]) as hooked:
            hooked(inputs, labels=labels, step_type="fit")
    reference = MeanDifferenceClassifier()
    reference.fit(cached.hooking_context.cache[layer], labels)
    assert (manager.estimators[f"{layer}_fwd"].coef_ == reference.coef_).all()
