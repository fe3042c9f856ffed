"""Tests of score tables: rows, selection, cube, equality, exports."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdprobe.errors import ConfigError, MissingExtraError
from tdprobe.tables import ScoreBlock, ScoreTable

SCORES = st.floats(width=64, allow_nan=True, allow_infinity=True)
LAYERS = {"a": ("h.0", "h.1", "h.2"), "b": ("h.1", "out"), "c": ("h.0",)}


def block(estimator="cka", a="base", b="tuned", values=((0.9, 0.2), (0.1, 0.7), (0.4, 0.3)), **options):
    """Make a block whose layers are named after their depth."""
    values = np.array(values)
    names = [tuple(f"model.layers.{i}" for i in range(size)) for size in values.shape]
    return ScoreBlock(estimator, a, b, names[0], names[1] if values.ndim == 2 else None, values, 64, **options)


@st.composite
def tables(draw):
    """Draw a pair estimator over checkpoints with different layers, and a layer estimator."""
    pairs = draw(st.lists(st.sampled_from([(x, y) for x in "abc" for y in "abc"]), unique=True, min_size=1))
    blocks = []
    for a, b in pairs:
        shape = (len(LAYERS[a]), len(LAYERS[b]))
        flat = draw(st.lists(SCORES, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
        values = np.array(flat).reshape(shape)
        blocks.append(ScoreBlock("cka", a, b, LAYERS[a], LAYERS[b], values, 10, draw(st.booleans())))
    flat = draw(st.lists(SCORES, min_size=3, max_size=3))
    blocks.append(ScoreBlock("twonn", "a", "a", LAYERS["a"], None, np.array(flat), 10))
    return ScoreTable(blocks, {"text": draw(st.text()), "nested": {"numbers": [1, 2.5, None, True]}})


def test_rows_carry_every_score_with_its_names():
    table = ScoreTable([block(), block("twonn", "base", "base", (5.0, 6.0))])
    rows = table.rows()
    assert len(table) == len(rows) == 8
    assert [row.score for row in rows] == [0.9, 0.2, 0.1, 0.7, 0.4, 0.3, 5.0, 6.0]
    assert rows[3][:7] == ("base", "tuned", "model.layers.1", "model.layers.1", "cka", 0.7, 64)
    assert rows[7][:7] == ("base", "base", "model.layers.1", "", "twonn", 6.0, 64)
    assert table.estimators == ("cka", "twonn")
    assert table.checkpoints == ("base", "tuned")
    assert table.layers("base") == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert table.layers("tuned") == ("model.layers.0", "model.layers.1")


def test_select_keeps_only_what_is_named():
    table = ScoreTable([block(), block(b="other"), block("rsa")], {"data": "x"})
    part = table.select(estimator="cka", checkpoint_b="tuned")
    assert part == ScoreTable([block()], {"data": "x"})
    assert table.select() == table


def test_matrix_is_a_copy_and_needs_no_names_where_one_block_fits():
    table = ScoreTable([block()])
    table.matrix()[0, 0] = 7.0
    assert table.matrix()[0, 0] == 0.9
    assert table.blocks[0].values.flags.writeable is False


def test_matrix_of_the_other_order_is_the_transpose_only_for_a_symmetric_estimator():
    table = ScoreTable([block(), block("regression", symmetric=False)])
    np.testing.assert_array_equal(table.matrix("cka", "tuned", "base"), table.matrix("cka", "base", "tuned").T)
    with pytest.raises(ConfigError, match="no scores for estimator='regression'"):
        table.matrix("regression", "tuned", "base")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"estimator": "ckaa"}, "unknown estimator 'ckaa'; did you mean 'cka'"),
        ({"checkpoint_a": "bse"}, "unknown checkpoint 'bse'; did you mean 'base'"),
        ({"checkpoint_b": "tund"}, "unknown checkpoint 'tund'; did you mean 'tuned'"),
        ({}, "2 sets of scores fit .*name one of: cka: base × tuned; rsa: base × tuned"),
        ({"checkpoint_b": "base"}, "2 sets of scores fit"),
        ({"checkpoint_a": "base", "checkpoint_b": "base"}, "no scores for"),
    ],
)
def test_names_that_fit_no_block_or_several_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        ScoreTable([block(), block("rsa")]).matrix(**names)


@given(tables())
def test_cube_holds_each_row_and_its_mirror_and_nothing_else(table):
    cube = table.cube("cka")
    symmetric = {b.key[1:]: b.symmetric for b in table.blocks if b.estimator == "cka"}
    known = {}
    rows = [row for row in table if row.estimator == "cka"]
    for row in rows:
        if symmetric[row.checkpoint_a, row.checkpoint_b]:
            known[row.checkpoint_b, row.checkpoint_a, row.layer_b, row.layer_a] = row.score
    for row in rows:
        known[row[:4]] = row.score
    expected = np.full(cube.values.shape, np.nan)
    for (a, b, layer_a, layer_b), score in known.items():
        spot = (cube.checkpoints.index(a), cube.checkpoints.index(b))
        expected[(*spot, cube.layers.index(layer_a), cube.layers.index(layer_b))] = score
    np.testing.assert_array_equal(cube.values, expected)


def test_cube_of_a_layer_estimator_has_two_axes():
    table = ScoreTable([block("twonn", "x", "x", (5.0, 6.0)), block("twonn", "y", "y", (7.0, 8.0, 9.0))])
    cube = table.cube()
    assert cube.layers == ("model.layers.0", "model.layers.1", "model.layers.2")
    np.testing.assert_array_equal(cube.values, [[5.0, 6.0, np.nan], [7.0, 8.0, 9.0]])


def test_cube_asks_for_the_estimator_where_there_are_several():
    with pytest.raises(ConfigError, match="name one of: cka, rsa"):
        ScoreTable([block(), block("rsa")]).cube()


@given(tables())
def test_json_brings_the_same_table_back(table):
    assert ScoreTable.from_json(table.to_json()) == table


def test_equality_looks_at_scores_names_and_meta():
    table = ScoreTable([block()], {"a": 1})
    assert table == ScoreTable([block()], {"a": 1})
    assert table != ScoreTable([block()], {"a": 2})
    assert table != ScoreTable([block(values=((0.9, 0.2), (0.1, 0.7), (0.4, 0.31)))], {"a": 1})
    assert table != ScoreTable([block(b="other")], {"a": 1})
    assert block(values=((np.nan,),)) == block(values=((np.nan,),))
    assert table != "table"


def test_pandas_frame_has_the_rows():
    pandas = pytest.importorskip("pandas", reason="needs the extra 'tables'")
    table = ScoreTable([block(), block("twonn", "base", "base", (5.0, 6.0))])
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    rows = [tuple(row) for row in frame.fillna(-1.0).itertuples(index=False)]
    assert rows == [tuple(-1.0 if value != value else value for value in row) for row in table]


def test_xarray_selects_by_name_and_keeps_depth_order():
    pytest.importorskip("xarray", reason="needs the extra 'tables'")
    names = tuple(f"h.{i}" for i in (0, 2, 10))
    values = np.arange(9.0).reshape(3, 3)
    table = ScoreTable(
        [
            ScoreBlock("cka", "b", "a", names, names, values, 5),
            ScoreBlock("twonn", "a", "a", ("h.10", "h.11"), None, np.array([1.0, 2.0]), 5),
        ]
    )
    data = table.to_xarray()
    assert list(data.coords["layer_a"].values) == ["h.0", "h.2", "h.10", "h.11"]
    assert data["cka"].sel(checkpoint_a="b", checkpoint_b="a", layer_a="h.10", layer_b="h.2").item() == 7.0
    assert data["cka"].sel(checkpoint_a="a", checkpoint_b="b", layer_a="h.2", layer_b="h.10").item() == 7.0
    assert data["twonn"].dims == ("checkpoint_a", "layer_a")
    assert data["twonn"].sel(checkpoint_a="a", layer_a="h.11").item() == 2.0
    assert np.isnan(data["twonn"].sel(checkpoint_a="b", layer_a="h.0").item())


@pytest.mark.parametrize(("method", "module"), [("to_pandas", "pandas"), ("to_xarray", "xarray")])
def test_missing_extra_is_named(monkeypatch, method, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"tdprobe\[tables\]"):
        getattr(ScoreTable([block()]), method)()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": np.zeros((2, 3))}, r"cka: a × b have shape \(2, 3\).*ask for \(2, 2\)"),
        ({"layers_a": ("x", "x")}, "layers_a of cka: a × b names a layer twice: x"),
        ({"layers_b": None}, r"cka: a have shape \(2, 2\).*\(2,\)"),
    ],
)
def test_block_refuses_scores_that_do_not_fit(options, message):
    fields = {
        "estimator": "cka",
        "checkpoint_a": "a",
        "checkpoint_b": "b",
        "layers_a": ("x", "y"),
        "layers_b": ("x", "y"),
        "values": np.eye(2),
        "n": 3,
    }
    with pytest.raises(ConfigError, match=message):
        ScoreBlock(**fields | options)


def test_table_refuses_the_same_pair_twice():
    with pytest.raises(ConfigError, match="cka: base × tuned twice"):
        ScoreTable([block(), block()])


def attributes(a="base", values=((0.9, 0.2), (0.1, 0.7), (0.4, 0.3)), names=("length", "tense"), **options):
    """Make a block of scores of layers for targets that came under one key."""
    layers = tuple(f"model.layers.{i}" for i in range(len(values)))
    se = np.full(np.shape(values), 0.1)
    return ScoreBlock("mig", a, "known", layers, names, values, 64, False, se, columns="targets", **options)


class TestTargets:
    def test_are_neither_a_checkpoint_nor_layers(self):
        table = ScoreTable([block(), attributes()])
        assert table.checkpoints == ("base", "tuned")
        assert table.layers() == table.layers("base") == ("model.layers.0", "model.layers.1", "model.layers.2")
        assert "checkpoints: base, tuned" in repr(table) and "3 layers × 2 targets" in repr(table)
        assert table.rows()[7][1:6] == ("known", "model.layers.0", "tense", "mig", 0.2)

    def test_can_be_selected_by_the_key_they_came_under(self):
        table = ScoreTable([block(), attributes()])
        assert table.select(checkpoint_b="known") == ScoreTable([attributes()])
        with pytest.raises(ConfigError, match="unknown checkpoint 'knwon'.*known"):
            table.select(checkpoint_b="knwon")
        with pytest.raises(ConfigError, match="unknown checkpoint 'known'"):
            table.select(checkpoint_a="known")

    def test_of_a_model_with_the_name_of_the_key_count_all(self):
        own = ScoreBlock("mig", "known", "known", ("a",), ("a",), [[0.5]], 9, False, columns="targets")
        assert "highest: a / a (0.5)" in repr(ScoreTable([own]))

    def test_have_an_axis_of_their_own_in_the_cube(self):
        table = ScoreTable([attributes(), attributes("tuned", ((0.5,),), ("tense",)), block()])
        cube = table.cube("mig")
        assert (cube.checkpoints, cube.targets) == (("base", "tuned"), ("length", "tense"))
        assert cube.layers == table.layers()
        np.testing.assert_array_equal(cube.values[0], table.matrix("mig", "base"))
        np.testing.assert_array_equal(cube.values[1, 0], [np.nan, 0.5])
        assert np.isnan(cube.values[1, 1:]).all()

    def test_survive_the_way_through_json(self):
        table = ScoreTable([block(), attributes()])
        again = ScoreTable.from_json(table.to_json())
        assert again == table and again.blocks[1].columns == "targets"
        assert again != ScoreTable([block(), attributes().__class__(**{**vars(attributes()), "columns": "layers"})])

    def test_are_a_dimension_of_the_dataset(self):
        pytest.importorskip("xarray", reason="needs the extra 'tables'")
        data = ScoreTable([block(), attributes(), block("twonn", "base", "base", (5.0, 6.0))]).to_xarray()
        assert data["mig"].dims == ("checkpoint_a", "layer_a", "target")
        assert float(data["mig"].sel(checkpoint_a="base", layer_a="model.layers.1", target="tense")) == 0.7
        assert list(data["checkpoint_b"].values) == ["base", "tuned"]
        assert data["twonn"].dims == ("checkpoint_a", "layer_a")

    def test_other_columns_are_refused(self):
        with pytest.raises(ConfigError, match="unknown kind of columns 'target'.*targets"):
            ScoreBlock("mig", "m", "known", ("a",), ("b",), [[0.5]], 9, columns="target")
