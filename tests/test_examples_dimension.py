"""What the example on intrinsic dimension says about its pictures is true."""

from __future__ import annotations

import numpy as np

from example_runs import run


def test_surfaces_are_measured_and_layers_ordered() -> None:
    wanted = ("twonn", "local", "truth", "dimension", "error", "imbalance", "repeated", "n")
    found = {key: np.array(value) for key, value in run("plot_09_intrinsic_dimension", *wanted).items()}
    twonn, local, truth = found["twonn"], found["local"], found["truth"]
    # Four standard errors, and a twentieth of the dimension for edges, up to the 5-cube.
    assert (abs(twonn - truth) < 6 * truth / 2000**0.5 + truth / 20)[:5].all()
    assert (abs(local - truth) < 0.12 * truth)[:5].all()
    # Edges cost more the more dimensions there are.
    assert (np.diff((local / truth)[3:]) < 0).all() and (twonn < truth)[3:].all()
    dimension, error = found["dimension"], found["error"]
    assert dimension.shape == error.shape == (31,) and (error > 0).all() and (error < dimension / 10).all()
    # From the first layer the dimension at the smallest scale rises to the middle third, and falls again.
    assert dimension[1] == dimension.min() and 12 <= dimension[1:].argmax() + 1 <= 24
    # Most tokens of the embedding are repeated, few of the layers after it.
    assert found["repeated"][0] > 0.3 * found["n"] and found["repeated"][1:].max() < 0.05 * found["n"]
    imbalance = found["imbalance"]
    assert (imbalance[5, 15:25] < imbalance[15:25, 5]).all()
    upper = np.triu_indices(31, 1)
    assert imbalance[upper].mean() < imbalance.T[upper].mean()
    assert np.diagonal(imbalance, 1)[1:].max() < 0.05
