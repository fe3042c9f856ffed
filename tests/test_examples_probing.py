"""What the examples on probes, units and heads say about their pictures is true."""

from __future__ import annotations

import numpy as np
import pytest

from example_runs import run


def test_sentiment_rises_with_depth_and_controls_stay_at_chance() -> None:
    found = run("plot_06_probing_sentiment", "results")["results"]
    (smol, n_smol), (mini, n_mini) = found.values()
    probe, controls = np.array(smol[0]), np.array(smol[1:])
    assert probe.shape == (31,) and n_smol > 100
    # Four standard errors of a coin: 4 * 0.5 / sqrt(139) = 0.17 for one control, half of it for the mean of four.
    assert abs(controls.mean(0) - 0.5).max() < 4 * 0.5 / (4 * n_smol) ** 0.5 + 0.03
    # An embedded full stop knows nothing, the upper half of the layers nearly everything.
    assert probe[0] < 0.6 and probe[15:].min() > 0.82
    assert probe[15:].min() > controls.max() + 0.1
    probe, controls = np.array(mini[0]), np.array(mini[1:])
    assert probe.shape == (7,) and probe.max() > controls.max() + 0.2 and probe.min() > 0.7
    assert abs(controls.mean(0) - 0.5).max() < 4 * 0.5 / (4 * n_mini) ** 0.5 + 0.03


def test_the_product_of_two_layers_is_found_by_bilinear_probes_only() -> None:
    found = run("plot_07_bilinear_probe", "alone", "together", "layers")
    together, layers = np.array(found["together"]), found["layers"]
    # 1000 fair labels: a standard deviation of 0.016.
    assert found["alone"] == pytest.approx([0.5] * 4, abs=0.065)
    holds_both = np.array([[{"a", "b"} <= set(a.split("_") + b.split("_")) for b in layers] for a in layers])
    assert holds_both.sum() == 4
    assert together[holds_both].min() > 0.98
    assert together[~holds_both] == pytest.approx(0.5, abs=0.065)


def test_units_have_topics_and_heads_have_habits() -> None:
    found = run("plot_08_max_activating", "words", "strongest", "best", "patterns", "half")
    topics = {
        "349": {"money", "million", "dollars", "savings", "billion", "profit"},
        "430": {"hear", "speaker", "volume", "sounds", "sound", "noise"},
        "1008": {"playful", "humor", "toys", "comedy"},
        "1199": {"River", "City", "Island", "Manhattan", "town", "borough"},
    }
    for unit, topic in topics.items():
        assert len(found["words"][unit]) == 8 and sum(word in topic for word in found["words"][unit]) >= 5
        assert found["strongest"].index(int(unit)) < 100
    patterns, half = np.array(found["patterns"]), found["half"]
    np.testing.assert_allclose(patterns.sum(-1), 1, atol=1e-5)
    assert (np.triu(patterns, 1) == 0).all()
    before, induction, first = (patterns[layer, head] for layer, head in found["best"].values())
    rows = np.arange(half, 2 * half)
    assert before[rows, rows - 1].mean() > 0.7 and induction[rows, rows - half + 1].mean() > 0.6
    assert first[:, 0].min() > 0.95
