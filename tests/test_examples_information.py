"""What the example on the noise layer says about its picture is true."""

from __future__ import annotations

import math

import numpy as np

from example_runs import run


def test_a_trained_noise_layer_keeps_the_verdict_at_little_information() -> None:
    found = run("plot_10_noise_layer", "trained", "shuffled", "alike", "readable")
    trained, shuffled, alike = (np.array(found[key]) for key in ("trained", "shuffled", "alike"))
    for points in (trained, shuffled, alike):
        low, high, accuracy = points.T
        assert (low <= high + 1e-6).all() and (low > 0).all() and (high <= math.log(256) + 1e-6).all()
        # Less is told step by step, and in the end half of it or less.
        assert high[-1] < high[0] and low[-1] < low[0] / 2
        assert (accuracy >= 0.4).all() and (accuracy <= 0.9).all()
    # All open is the judge as it was, nearly all closed is chance: 300 draws of a coin.
    assert alike[0, 2] > 0.72 and abs(alike[-1, 2] - 0.5) < 4 * 0.5 / 150**0.5
    scarce = trained[:, 1] < 3
    assert scarce.sum() >= 2
    assert trained[scarce, 2].mean() > 0.58 and trained[scarce, 2].mean() > shuffled[scarce, 2].mean() + 0.05
    telling = {"not", "worst", "worse", "bad", "stupid", "trash", "disgusting", "fail", "complain", "crashed", "dead"}
    telling |= {"great", "love", "excellent", "wonderful", "awesome", "terrific", "amazing", "nothing", "cancelled"}
    assert len(telling & set(found["readable"])) >= 5
