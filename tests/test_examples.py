"""The examples run as scripts, offline, and what they say about their pictures is true."""

from __future__ import annotations

import numpy as np
import pytest

from example_runs import run
from tdprobe import ScoreTable


def test_tokens_with_massive_activations_decide_the_picture_of_the_layers() -> None:
    found = run("plot_01_layers_of_a_language_model", "tables", "to_last")
    printed = found["printed"]
    every, headless, ten, three = (ScoreTable.from_json(text).matrix() for text in found["tables"].values())
    # One word decides: above layer 10 all is one block, cut off from below. With a limit the block dissolves.
    assert headless[11:28, 11:28].min() > 0.9 and headless[11:28, :11].max() < 0.3
    assert every[11:, 11:].min() > 0.9
    assert ten[10, 15] > 0.8 and ten[2:9, 2:9].min() > 0.9 and ten[2:9, 10:].max() < 0.3
    # Without the short words: similarity falls with the distance in depth.
    means = [np.diagonal(three, offset).mean() for offset in range(20)]
    assert means == sorted(means, reverse=True) and three[2:9, 10:16].min() > 0.6
    lengths = {name: np.array(values) for name, values in found["curves"].items()}
    usual = lengths["other tokens, median"]
    assert (lengths["first token, median"] > 30 * usual)[11:28].all() and (usual < 1000).all()
    assert (lengths["other tokens, longest"] > 30 * usual)[11:28].all()
    assert (lengths["other tokens, 98th percentile"] > 4 * usual)[2:8].all()
    assert (np.diff(found["to_last"])[9:] > -0.02).all() and found["to_last"][-1] == pytest.approx(1)
    assert found["figures"] == 3 and "'on'" in printed


def test_similarity_to_the_final_checkpoint_rises_with_the_step() -> None:
    found = run("plot_02_training_checkpoints", "table", "gap", "layers", "similarity", "errors")
    table = ScoreTable.from_json(found["table"])
    similarity, errors = (
        {measure: np.array([curves[layer] for layer in found["layers"]]) for measure, curves in found[key].items()}
        for key in ("similarity", "errors")
    )
    assert list(similarity) == ["cka", "procrustes", "mutual_knn", "information_imbalance"] and found["figures"] == 2
    for measure, values in similarity.items():
        closer = values if measure in ("cka", "mutual_knn") else -values
        assert closer.shape == errors[measure].shape == (4, 6) and (errors[measure][:, :-1] > 0).all()
        assert (np.diff(closer, axis=1) > 0).all() and (closer[0, :-1] == closer[:, :-1].max(0)).all(), measure
    assert similarity["cka"][:, -1] == pytest.approx(1) and similarity["procrustes"][:, -1] == pytest.approx(
        0, abs=0.01
    )
    # Half-way by CKA at step 25; neighbours settle last.
    cka, common, imbalance = (similarity[name] for name in ("cka", "mutual_knn", "information_imbalance"))
    assert cka[:, 1].min() > 0.45 and common[:, 1].max() < 0.3
    assert cka[:, 4].min() > 0.9 and common[:, 4].min() > 0.45 and common[:, 4].max() < 0.72
    assert imbalance[:, 4].max() < 0.05 and imbalance[0, 0] < 0.25
    start, middle, late = (table.matrix("cka", step, "step 400") for step in ("step 0", "step 100", "step 200"))
    assert start.max() < 0.5
    assert (middle.argmax(1) == 0).all()
    assert (abs(late.argmax(1) - np.arange(4)) <= 1).all()
    assert found["gap"] < 0.15


def test_generated_tokens_are_cached_in_order_and_an_early_stop_ends_the_pass() -> None:
    found = run("plot_03_caching_and_generate", "phases", "shapes", "probability", "ran", "difference")
    printed = found["printed"]
    assert "Paris" in printed
    assert found["phases"] == ["prompt"] + ["generated"] * 7
    assert found["shapes"] == [[1, 5, 576]] + [[1, 1, 576]] * 7
    probability = np.array(found["probability"])
    assert probability[0].argmax() >= 28 and probability[0, :25].max() < 0.05
    assert (probability[1:4, 12:25].max(1) > 0.6).all()
    assert found["ran"] == [f"model.layers.{layer}" for layer in range(10)]
    assert found["difference"] < 1e-4
    assert "output: None   same activation: True" in printed
    assert found["figures"] == 1
