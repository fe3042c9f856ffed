"""What the examples that set measures side by side say about their pictures is true."""

from __future__ import annotations

import numpy as np

from example_runs import run
from tdprobe import ScoreTable


def test_sixteen_measures_order_layers_mostly_alike() -> None:
    found = run("plot_13_measures_side_by_side", "table", "of_means", "agreement", "chance", "chance_knn")
    table = ScoreTable.from_json(found["table"])
    names = table.estimators
    assert len(names) == 16 and found["figures"] == 3
    assert {table.block(name).n for name in names} == {1473}
    # Neighbouring layers are more alike than the first and the last; of distances less is more alike.
    for name in names:
        values = table.matrix(name)
        sign = -1 if name in ("procrustes", "gulp", "information_imbalance") else 1
        assert (sign * (np.diagonal(values, 1) - values[0, -1]) > 0).all(), name
    agreement = dict(zip(names, np.array(found["agreement"]), strict=True))
    place = {name: position for position, name in enumerate(names)}
    alike = ["cka", "cka, rbf kernel", "distance_correlation", "rsa", "procrustes", "gulp"]
    alike += ["cknna", "mutual_knn", "jaccard", "rank_similarity"]
    assert min(agreement[a][place[b]] for a in alike for b in alike) > 0.92
    correlations = ("cca", "svcca", "pwcca")
    among = min(agreement[a][place[b]] for a in correlations for b in correlations)
    assert among > max(agreement[name][place["cka"]] for name in correlations)
    assert min(names, key=lambda name: agreement[name].mean()) == "second_order_cosine"
    off = ~np.eye(8, dtype=bool)
    assert table.matrix("second_order_cosine")[off].min() > 0.9
    # Chance is most of what CCA sees of far layers, and nothing of what mutual kNN does.
    lowest = table.matrix("cca")[off].min()
    assert 0.5 < found["chance"] < lowest < found["chance"] + 0.1
    assert abs(found["chance_knn"]) < 0.01 and table.matrix("mutual_knn")[off].min() > 0.1
    regression, imbalance = table.matrix("linear_regression"), table.matrix("information_imbalance")
    assert regression[-1, 0] > regression[0, -1] + 0.05 and imbalance[0, -1] < imbalance[-1, 0] - 0.05
    # Early layers (2 to 8) against those in the middle (12 to 20): no more in common than chance.
    block = ScoreTable.from_json(found["of_means"]).block("cka")
    dotted = block.p > 0.05
    assert block.n == 64 and dotted[1:5, 6:11].sum() >= 5 and dotted[1:3, 7:10].mean() > 0.6
    assert not dotted[:5, :5].any() and not dotted[6:13, 6:13].any()


def test_two_models_meet_half_way() -> None:
    found = run("plot_14_two_models", "table", "directions", "errors")
    table = ScoreTable.from_json(found["table"])
    cka, common, imbalance = (table.matrix(name, "MiniLM", "SmolLM2") for name in table.estimators)
    assert cka.shape == (7, 31) and found["figures"] == 2
    for values in (cka, common):
        row, column = np.unravel_index(values.argmax(), values.shape)
        assert row in (2, 3) and 15 <= column <= 18
    for values in (cka, common, -imbalance):
        assert values[6].max() < values[:6].max(1).min() and 27 <= values[6].argmax() <= 29
    assert 0.45 < common.max() < 0.55
    assert (np.diff(cka.argmax(1)) >= 0).all() and cka.argmax(1)[-1] == 28
    # Against the middle of MiniLM: what is left in layer 3 of what was there in layer 1.
    assert (cka[2:4, 3] / cka[2:4, 1] < 0.4).all() and (common[2:4, 3] / common[2:4, 1] > 0.55).all()
    assert (cka[2:4, 10] > cka[2:4, 3:9].max(1) + 0.1).all() and (common[2:4, 10] > common[2:4, 3:9].max(1)).all()
    there, back = (np.array(values) for values in found["directions"].values())
    error = np.array(list(found["errors"].values()))
    assert error.min() > 0 and (there[3:9] + 2 * error[0, 3:9] < back[3:9] - 2 * error[1, 3:9]).all()
    assert abs(there - back)[12:].max() < 0.1
