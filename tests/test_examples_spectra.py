"""What the example on spectra says about its pictures is true."""

from __future__ import annotations

import numpy as np
import pytest

from example_runs import run


def test_known_spectra_are_counted_and_layers_are_as_described() -> None:
    found = run("plot_11_spectra_by_layer", "known", "scores", "powers", "n", "layers")
    known = {name: np.array(values) for name, values in found["known"].items()}
    shares = np.arange(1.0, 41) ** -np.array(found["powers"])[:, None]
    shares /= shares.sum(1, keepdims=True)
    np.testing.assert_allclose(known["participation ratio"], 1 / (shares**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(known["effective rank"], np.exp(-(shares * np.log(shares)).sum(1)), rtol=1e-5)
    roots = np.sqrt(shares) / np.sqrt(shares).sum(1, keepdims=True)
    np.testing.assert_allclose(known["RankMe"], np.exp(-(roots * np.log(roots)).sum(1)), rtol=1e-5)
    assert all(values[0] == pytest.approx(40, rel=1e-5) for values in known.values())

    scores = {name: np.array(values) for name, values in found["scores"].items()}
    assert len(found["layers"]) == 31 and all(values.shape == (31,) for values in scores.values())
    ratio, rank, rankme = (scores[name] for name in ("participation_ratio", "effective_rank", "rankme"))
    assert ((ratio > 1) & (ratio < rank) & (rank < rankme) & (rankme < 576)).all()
    # Little variety in the embedding and in the last layer; RankMe sees forty times as much in the first.
    assert max(ratio[0], ratio[-1]) < ratio[1:-1].min() and max(rank[0], rank[-1]) < rank[1:-1].min()
    assert 30 < rankme[0] / ratio[0] < 50 and rankme[0] == rankme.max()
    # What tokens share grows with depth, and their differences stay.
    raw, centred = scores["entropy"], scores["entropy centred"]
    gap = centred - raw
    assert gap[0] < 0.2 and gap[2:-1].min() > 1.5 and gap[24:30].mean() > gap[2:8].mean() + 0.5
    assert np.ptp(centred[2:-1]) < 0.5
    degrees = np.degrees(scores["curvature"])
    assert degrees[0] == pytest.approx(120, abs=2)
    assert degrees[14:].max() < degrees[2:10].min() < 119 and np.ptp(degrees[14:]) < 2
