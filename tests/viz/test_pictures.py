"""Tests of heat maps, curves and their labels."""

from __future__ import annotations

import io
import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdprobe import registry
from tdprobe.errors import ConfigError, MissingExtraError
from tdprobe.tables import ScoreBlock, ScoreTable
from tdprobe.viz import curves, heatmap
from tdprobe.viz.labels import colour_range, shorten

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra 'plot'")

PART = st.text("ab01", min_size=1, max_size=2)
NAMES = st.lists(st.lists(PART, min_size=1, max_size=4).map(".".join), min_size=1, max_size=6, unique=True)
SIMILARITY = registry.get("cka").spec
DISTANCE = replace(SIMILARITY, bounds=(0.0, np.inf), larger_means="more different")


def layers(count):
    """Name ``count`` layers as transformers does."""
    return tuple(f"model.layers.{i}" for i in range(count))


def scores(count, seed=0):
    """Return scores that fall off from the diagonal."""
    depth = np.arange(count)
    noise = np.random.default_rng(seed).uniform(0.9, 1.0, (count, count))
    return np.exp(-np.abs(depth[:, None] - depth) / 8) * noise


def brightness(image, value):
    """Return the luminance of the colour that stands for a score."""
    return np.dot(image.to_rgba(value)[:3], (0.2126, 0.7152, 0.0722))


def overlaps(figure, axis):
    """Count neighbouring tick labels that touch."""
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
    return sum(first.overlaps(second) for first, second in itertools.pairwise(boxes))


@given(NAMES)
def test_short_labels_and_pattern_give_the_names_back(names):
    short, pattern = shorten(names)
    assert [(pattern or "*").replace("*", label) for label in short] == names
    assert len(set(short)) == len(names)
    assert all(short)


def test_shared_parts_at_both_ends_are_left_out():
    names = ["model.layers.10.mlp", "model.layers.11.mlp", "model.layers.9.mlp"]
    assert shorten(names) == (("10", "11", "9"), "model.layers.*.mlp")
    assert shorten(["lm_head", "model.norm"]) == (("lm_head", "model.norm"), "")
    assert shorten(["a.b", "a.b.c"]) == (("b", "b.c"), "a.*")


@pytest.mark.parametrize(
    ("values", "spec", "expected"),
    [
        ([0.2, 0.9], SIMILARITY, (0.0, 1.0)),
        ([-0.1, 1.2], SIMILARITY, (-0.1, 1.2)),
        ([0.2, 3.0], DISTANCE, (0.0, 3.0)),
        ([0.2, np.nan, np.inf, 0.7], None, (0.2, 0.7)),
        ([2.0, 2.0], None, (1.5, 2.5)),
        ([np.nan], None, (0.0, 1.0)),
    ],
)
def test_colours_span_the_bounds_or_the_data(values, spec, expected):
    assert colour_range(np.array(values), spec) == expected


def test_heat_map_holds_the_scores_upwards_and_names_what_it_shows():
    values = scores(30)
    values[3, 4] = np.nan
    figure = heatmap(
        values,
        layers(30),
        layers(30),
        estimator="cka",
        checkpoint_a="base",
        checkpoint_b="tuned",
        n=512,
        spec=SIMILARITY,
    )
    ax, bar = figure.axes
    image = ax.images[0]
    np.testing.assert_array_equal(image.get_array().filled(np.nan), values)
    assert image.origin == "lower"
    assert ax.get_aspect() == 1.0
    assert image.get_clim() == (0.0, 1.0)
    assert ax.get_title(loc="left") == "cka: base × tuned (n = 512)"
    assert ax.get_ylabel() == "layer of base (model.layers.*)"
    assert ax.get_xlabel() == "layer of tuned (model.layers.*)"
    assert bar.get_ylabel() == "cka (larger: more similar)"
    grey = image.cmap(np.ma.masked_invalid([np.nan]))[0][:3]
    assert np.ptp(grey) == 0.0
    assert not ax.texts


@pytest.mark.parametrize("count", [3, 30, 80])
def test_every_tick_label_can_be_read(count):
    figure = heatmap(scores(count), layers(count), layers(count))
    ax = figure.axes[0]
    shown = [label.get_text() for label in ax.get_xticklabels()]
    assert shown == [str(i) for i in range(0, count, 2 if count > 40 else 1)]
    assert overlaps(figure, ax.xaxis) == 0
    assert overlaps(figure, ax.yaxis) == 0


def test_long_names_stay_inside_the_picture():
    names = tuple(f"transformer.h.{i}.{part}" for i in range(3) for part in ("attention.output", "mlp"))
    figure = heatmap(scores(6), ("lm_head", *names[1:]), names, checkpoint_a="gpt" * 12, checkpoint_b="b")
    figure.draw_without_rendering()
    ax = figure.axes[0]
    for text in (*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label):
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(("rows", "columns"), [(30, 6), (6, 30), (12, 12), (40, 1), (1, 40), (8, 6)])
def test_titles_of_tall_and_wide_maps_stay_inside_the_picture(rows, columns):
    spec = registry.get("information_imbalance").spec
    names = {"estimator": "information_imbalance", "checkpoint_a": "demo", "checkpoint_b": "demo-encoder"}
    p = np.full((rows, columns), 0.5)
    p.flat[0] = 0.05
    figure = heatmap(np.zeros((rows, columns)), layers(rows), layers(columns), spec=spec, n=4000, p=p, **names)
    figure.draw_without_rendering()
    ax, bar = figure.axes
    assert ax.get_title(loc="left").replace("\n", " ").endswith("(n = 4000); dots: p > 0.05")
    for text in (ax._left_title, bar.yaxis.label, ax.xaxis.label, ax.yaxis.label):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text


@pytest.mark.parametrize(("spec", "bright"), [(SIMILARITY, 1.0), (None, 1.0), (DISTANCE, 0.0)])
def test_bright_means_similar(spec, bright):
    image = heatmap(np.eye(2), layers(2), layers(2), spec=spec).axes[0].images[0]
    assert brightness(image, bright) > brightness(image, 1.0 - bright) + 0.5


def test_few_layers_show_their_numbers_in_readable_ink():
    values = np.array([[1.0, 0.25], [np.nan, 0.0]])
    ax = heatmap(values, layers(2), layers(2), spec=SIMILARITY).axes[0]
    found = {text.get_position(): (text.get_text(), text.get_color()) for text in ax.texts}
    assert found == {(0, 0): ("1", "black"), (1, 0): ("0.25", "white"), (1, 1): ("0", "white")}


def test_heat_map_refuses_scores_that_do_not_fit_the_names():
    with pytest.raises(ConfigError, match=r"\(2, 2\) scores do not fit 3 rows and 2 columns"):
        heatmap(np.eye(2), layers(3), layers(2))


def test_curves_hold_the_values_and_the_names():
    figure = curves({"base": [1.0, 2.0], "tuned": [3.0, np.nan]}, ["h.0", "h.1"], estimator="twonn", title="t")
    ax = figure.axes[0]
    assert [line.get_label() for line in ax.lines] == ["base", "tuned"]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [3.0, np.nan])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["base", "tuned"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("layer (h.*)", "twonn", "t")


@pytest.mark.parametrize("series", [{}, {"a": [1.0], "b": [1.0, 2.0]}])
def test_curves_refuse_uneven_or_no_values(series):
    with pytest.raises(ConfigError, match="curves must have one length"):
        curves(series)


def table():
    """Return two checkpoints with all pairs of cka and one layer estimator."""
    blocks = [
        ScoreBlock("cka", a, b, layers(4), layers(4), scores(4, i), 9)
        for i, (a, b) in enumerate([("x", "x"), ("x", "y"), ("y", "y")])
    ]
    blocks.append(ScoreBlock("twonn", "x", "x", layers(4), None, np.arange(4.0), 9))
    blocks.append(ScoreBlock("twonn", "y", "y", layers(3), None, np.arange(3.0), 9))
    return ScoreTable(blocks)


def test_plot_draws_all_pairs_in_one_colour_range():
    *panels, _ = table().plot("cka").axes
    images = [ax.images[0] for ax in panels if ax.images]
    assert len(images) == 3
    assert len({image.get_clim() for image in images}) == 1
    np.testing.assert_array_equal(images[1].get_array(), scores(4, 1))


def test_plot_takes_the_order_that_is_asked_for():
    image = table().plot("cka", "y", "x").axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), scores(4, 1).T)


def test_plot_of_a_layer_estimator_leaves_a_gap_where_a_layer_is_missing():
    figure = table().plot("twonn")
    base, tuned = figure.axes[0].lines
    np.testing.assert_array_equal(base.get_ydata(), [0.0, 1.0, 2.0, 3.0])
    np.testing.assert_array_equal(tuned.get_ydata(), [0.0, 1.0, 2.0, np.nan])
    assert figure.axes[0].get_title(loc="left") == "twonn (n = 9)"


def test_plot_draws_into_given_axes_and_asks_where_it_is_ambiguous():
    ax = matplotlib.figure.Figure().add_subplot()
    assert table().plot("cka", "x", "x", ax=ax) is ax.figure
    np.testing.assert_array_equal(ax.images[0].get_array(), scores(4, 0))
    with pytest.raises(ConfigError, match="name one of: cka, twonn"):
        table().plot()
    with pytest.raises(ConfigError, match="3 pairs of checkpoints do not fit one ax"):
        table().plot("cka", ax=ax)


def test_pictures_save_and_show_without_pyplot_keeping_them():
    from matplotlib import _pylab_helpers

    figure = table().plot("cka")
    assert figure._repr_png_().startswith(b"\x89PNG")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    assert buffer.getvalue().rstrip().endswith(b"</svg>")
    assert not _pylab_helpers.Gcf.figs


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"tdprobe\[plot\]"):
        table().plot("cka")


def test_dots_mark_what_unrelated_rows_reach_and_the_title_says_so():
    p = np.array([[0.05, 0.4], [np.nan, 0.05]])
    figure = heatmap(np.eye(2), ["h.0", "h.1"], ["h.0", "h.1"], estimator="cka", n=9, p=p)
    (dots,) = figure.axes[0].collections
    assert dots.get_offsets().tolist() == [[1.0, -0.3]]  # below the number in the cell
    assert figure.axes[0].get_title(loc="left").endswith("dots: p > 0.05")
    few = heatmap(np.eye(2), ["h.0", "h.1"], ["h.0", "h.1"], p=np.array([[0.1, 0.1], [0.1, 0.3]]))
    assert few.axes[0].collections[0].get_offsets().tolist() == [[1.0, 0.7]]
    assert few.axes[0].get_title(loc="left").endswith("dots: p > 0.1")
    names = [f"h.{i}" for i in range(9)]
    bare = heatmap(np.eye(9), names, names, p=np.where(np.eye(9) > 0, 0.01, 0.01 + 0.5 * (np.arange(9) == 4)))
    assert not bare.axes[0].texts and bare.axes[0].collections[0].get_offsets().tolist()[0] == [4.0, 0.0]
    plain = heatmap(np.eye(2), ["h.0", "h.1"], ["h.0", "h.1"], p=np.full((2, 2), 0.01))
    assert not plain.axes[0].collections and "dots" not in plain.axes[0].get_title(loc="left")


def test_bands_are_two_standard_errors_wide():
    block = ScoreBlock("twonn", "m", "m", ("h.0", "h.1"), None, [3.0, 5.0], 9, se=[0.5, 1.0])
    figure = ScoreTable([block]).plot()
    (band,) = figure.axes[0].collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(0.0, 2.0), (0.0, 4.0), (1.0, 3.0), (1.0, 7.0)} <= corners
    assert "band: 2 standard errors" in figure.axes[0].get_title(loc="left")
    assert ScoreTable([block]).plot(title="mine").axes[0].get_title(loc="left") == "mine"


def test_targets_are_curves_over_depth():
    values = np.array([[0.1, 0.4], [0.2, 0.3], [0.5, 0.0]])
    block = ScoreBlock("mig", "m", "known", layers(3), ("length", "tense"), values, 9, False, columns="targets")
    figure = ScoreTable([block]).plot()
    assert {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines} == {
        "length": [0.1, 0.2, 0.5],
        "tense": [0.4, 0.3, 0.0],
    }
    assert figure.axes[0].get_title(loc="left") == "mig: m (n = 9)"
    both = ScoreTable([block, replace(block, checkpoint_a="other")]).plot("mig")
    assert [line.get_label() for line in both.axes[0].lines] == [
        "m: length",
        "m: tense",
        "other: length",
        "other: tense",
    ]
