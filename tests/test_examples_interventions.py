"""What the examples on patching and steering say about their pictures is true."""

from __future__ import annotations

import numpy as np
import pytest

from example_runs import run


def test_the_fact_stays_at_the_country_until_attention_moves_it_to_the_end() -> None:
    found = run("plot_04_patching", "recovered", "words", "shares", "answer", "high", "low")
    recovered, words = np.array(found["recovered"]), found["words"]
    assert words == ["The", "capital", "of", "Italy", "is"] and found["answer"] == " Paris"
    assert found["high"] > 3 and found["low"] < -3
    # Layers up to 22 at the country, layers from 23 at the end, nothing before.
    assert recovered[:23, 3].min() > 0.9 and recovered[23:, 4].min() > 0.9
    assert (
        abs(recovered[:, :3]).max() < 1e-3 and abs(recovered[23:, 3]).max() < 0.1 and abs(recovered[:23, 4]).max() < 0.1
    )
    attention, mlp = np.array(found["shares"]["attention"]), np.array(found["shares"]["MLP"])
    assert attention.argmax() == 23 and attention[23] > 0.9 and np.delete(attention, 23).max() < 0.3
    assert mlp.max() < 0.3


def test_steering_turns_the_review_round() -> None:
    found = run("plot_05_steering", "texts", "same", "odds", "scales")
    assert found["same"] is True
    assert found["texts"]["0"].startswith("amazing") and found["texts"]["-2"].startswith("terrible")
    every, last, first = (np.array(found["odds"][tokens]) for tokens in ("all", "last", "0"))
    middle = found["scales"].index(0)
    assert every[middle] == pytest.approx(last[middle]) == first[middle]
    # Every token moves the odds most, the first one hardly at all.
    assert np.ptp(every) > np.ptp(last) > 3 * np.ptp(first)
    assert (np.diff(last) > 0).all() and every[:middle].max() < every[middle] < every[middle + 1 :].min()
