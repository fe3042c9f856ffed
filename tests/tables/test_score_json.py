"""Tests of score tables in files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tdprobe.errors import ConfigError
from tdprobe.tables import ScoreBlock, ScoreTable
from tdprobe.tables.score_json import atomic_text


def sample():
    """Return a table with NaN, infinities and names beyond ASCII."""
    values = np.array([[0.1 + 0.2, np.nan], [np.inf, -np.inf]])
    return ScoreTable([ScoreBlock("cka", "básis", "b", ("x", "y"), ("x", "y"), values, 3)], {"data": "größe"})


def refuse(token):
    """Stop the parser at what JSON does not have."""
    raise AssertionError(f"{token} is not JSON")


def test_file_is_strict_json_that_comes_back_to_the_last_bit(tmp_path):
    path = tmp_path / "scores.json"
    text = sample().to_json(path)
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert found == json.loads(text)
    assert found["blocks"][0]["values"] == [0.1 + 0.2, None, None, None]
    assert (found["format"], found["version"]) == ("tdprobe.scores", 2)
    for source in (path, str(path), text):
        assert ScoreTable.from_json(source) == sample()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not JSON"),
        ("[1, 2]", "JSON but not a score table"),
        ('{"format": "other"}', "JSON but not a score table"),
        ('{"format": "tdprobe.scores", "version": 99}', "format version 99; this tdprobe reads versions up to 2"),
        ('{"format": "tdprobe.scores", "version": 1, "meta": {}}', "damaged score table .*blocks"),
        ('{"format": "tdprobe.scores", "version": 1, "meta": {}, "blocks": [{}]}', "damaged .*estimator"),
    ],
)
def test_wrong_files_are_named_and_explained(tmp_path, text, message):
    path = tmp_path / "found.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"(?s)found.json.*{message}"):
        ScoreTable.from_json(path)


def test_missing_file_and_wrong_encoding_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.json"):
        ScoreTable.from_json(tmp_path / "nowhere.json")
    latin = tmp_path / "latin.json"
    latin.write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.json.* is not UTF-8"):
        ScoreTable.from_json(latin)


def test_values_that_do_not_fit_the_layers_are_damage(tmp_path):
    found = json.loads(sample().to_json())
    found["blocks"][0]["values"].pop()
    with pytest.raises(ConfigError, match="the text is a damaged score table"):
        ScoreTable.from_json(json.dumps(found))


@pytest.mark.parametrize("value", [Path("x"), float("nan"), {1, 2}])
def test_meta_that_does_not_fit_into_json_is_refused_at_once(value):
    with pytest.raises(ConfigError, match="meta does not fit into JSON"):
        ScoreTable([], {"odd": value})


def test_meta_is_a_value_of_its_own():
    meta = {"layers": ("a", "b")}
    table = ScoreTable([], meta)
    meta["later"] = 1
    assert table.meta == {"layers": ["a", "b"]}


def test_folder_that_does_not_exist_and_folder_as_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*scores\.json.*create the folder first"):
        sample().to_json(tmp_path / "missing" / "scores.json")
    with pytest.raises(ConfigError, match="it is a folder; add a file name"):
        sample().to_json(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_text(path) as handle:
        handle.write("half of the new")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["scores.json"]
