"""What the example on intrinsic dimension says about its pictures is true."""

from __future__ import annotations

import numpy as np

from example_runs import run


def test_surfaces_are_measured_and_layers_ordered() -> None:
    wanted = ("twonn", "local", "truth", "imbalance", "repeated", "n", "by_scale", "scale_error")
    raw = run("plot_09_intrinsic_dimension", *wanted, "dimension", "error")
    dimensions, errors = ({key: np.array(value) for key, value in raw[name].items()} for name in ("dimension", "error"))
    found = {key: np.array(raw[key]) for key in wanted}
    twonn, local, truth = found["twonn"], found["local"], found["truth"]
    # Four standard errors, and a twentieth of the dimension for edges, up to the 5-cube.
    assert (abs(twonn - truth) < 6 * truth / 2000**0.5 + truth / 20)[:5].all()
    assert (abs(local - truth) < 0.12 * truth)[:5].all()
    # Edges cost more the more dimensions there are.
    assert (np.diff((local / truth)[3:]) < 0).all() and (twonn < truth)[3:].all()
    for name, values in dimensions.items():
        assert values.shape == (31,) and (errors[name] > 0).all() and (errors[name] < values / 10).all(), name
    dimension = dimensions["twonn"]
    # From the first layer the dimension at the smallest scale rises to the middle third, and falls again.
    assert dimension[1] == dimension.min() and 12 <= dimension[1:].argmax() + 1 <= 24
    # In the last third TwoNN falls, estimators that look further stay; local kNN looks furthest.
    for name, stays in (("twonn", False), ("mle", True), ("gride 8", True)):
        assert (dimensions[name][29] > 0.9 * dimensions[name][1:].max()) == stays, name
    assert (dimensions["local_knn"][1:] > dimensions["gride 8"][1:]).all()
    by_scale, scale_error = found["by_scale"], found["scale_error"]
    assert by_scale.shape == scale_error.shape == (6, 31) and (scale_error > 0).all()
    assert by_scale[:5, 1].min() > 2 and by_scale[:5, 1].max() < 4
    assert (np.diff(by_scale[2:, 15]) > 2 * scale_error[2:-1, 15]).all() and by_scale[0, 15] < 0.7 * dimension[15]
    # Most tokens of the embedding are repeated, few of the layers after it.
    assert found["repeated"][0] > 0.3 * found["n"] and found["repeated"][1:].max() < 0.05 * found["n"]
    imbalance = found["imbalance"]
    assert (imbalance[5, 15:25] < imbalance[15:25, 5]).all()
    upper = np.triu_indices(31, 1)
    assert imbalance[upper].mean() < imbalance.T[upper].mean()
    assert np.diagonal(imbalance, 1)[1:].max() < 0.05
