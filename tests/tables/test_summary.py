"""Tests of the short text and HTML of score tables."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np

from tdprobe import registry
from tdprobe.tables import ScoreBlock, ScoreTable


def block(estimator="cka", b="tuned", values=((0.9, 0.2), (0.1, 0.7))):
    """Make a block whose layers are named after their depth."""
    names = [tuple(f"model.layers.{i}" for i in range(size)) for size in np.shape(values)]
    return ScoreBlock(estimator, "base", b, names[0], names[1], values, 64)


def test_repr_names_the_ends_and_leaves_out_a_layer_with_itself():
    values = [[1.0, 0.8, 0.1], [0.8, 1.0, 0.3], [0.1, 0.3, 1.0]]
    text = repr(ScoreTable([block(b="base", values=values)]))
    assert "most similar: model.layers.0 / model.layers.1 (0.8)" in text
    assert "least similar: model.layers.0 / model.layers.2 (0.1)" in text
    assert "n=64" in text


def test_repr_turns_round_for_a_distance_and_stays_neutral_for_an_unknown_estimator(monkeypatch):
    row = SimpleNamespace(spec=dataclasses.replace(registry.get("cka").spec, larger_means="more different"))
    table = ScoreTable([block("somewhere_else")])
    assert "highest: model.layers.0 / model.layers.0 (0.9)" in repr(table)
    monkeypatch.setattr("tdprobe.tables.summary.registry.get", lambda name: row)
    assert "least similar: model.layers.0 / model.layers.0 (0.9)" in repr(table)


def test_repr_of_nothing_and_of_nothing_but_nan():
    assert repr(ScoreTable([])) == "ScoreTable: 0 scores; estimators: none; checkpoints: none"
    assert "no score beyond a layer with itself" in repr(ScoreTable([block(b="base", values=[[1.0]])]))
    assert "no score" in ScoreTable([block(values=[[np.nan, np.inf]])])._repr_html_()


class Tags(HTMLParser):
    """Collect tags and texts, and check that each tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html_escapes_names_and_shows_numbers_of_few_layers():
    evil = "<img src=x onerror=alert(1)>"
    names = (evil, "a & b")
    html = ScoreTable([ScoreBlock("cka", evil, "b", names, names, [[0.25, 0.5], [0.75, 1]], 9)])._repr_html_()
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    assert set(tags.seen) <= {"div", "p", "b", "table", "caption", "tr", "td", "th", "style"}
    assert {evil, "a & b", "0.25", "0.75"} <= set(tags.texts)


def test_html_stays_small_at_thirty_layers_and_drops_the_heat_table_beyond_forty():
    assert len(ScoreTable([block(values=np.eye(30))])._repr_html_()) < 120_000
    assert len(ScoreTable([block(values=np.eye(200))])._repr_html_()) < 2_000
