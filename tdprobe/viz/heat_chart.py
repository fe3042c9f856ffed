"""Interactive heat map of a score table, as a Vega-Lite specification.

The data stay one record per block with nested arrays, which the browser filters and unrolls; one record per
cell would be ten times the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tdprobe.errors import require_extra
from tdprobe.tables.summary import larger_is_similar, spec_of
from tdprobe.viz.labels import colour_range, null_limit, null_note, shorten
from tdprobe.viz.vega import choice, finish, label_axis, plain_numbers

if TYPE_CHECKING:
    from tdprobe.tables.block import ScoreBlock
    from tdprobe.tables.table import ScoreTable

SIDE = 480
NUMBERED_LAYERS = 8
MARK = "#e8452c"
LOW, HIGH = (f"ranges[estimator][fit ? 'data' : 'bounds'][{end}]" for end in (0, 1))
COUNT = "counts[estimator + ': ' + pair]"
NOTE = "notes[estimator + ': ' + pair]"
TITLE = f"estimator + ': ' + pair + ({COUNT} ? ' (n = ' + {COUNT} + {NOTE} + ')' : ' was not scored')"
ERROR = "isValid(datum.se) ? ' ± ' + format(datum.se, '.2~g') : ''"
NULL = "isValid(datum.p) ? ', p = ' + format(datum.p, '.3~g') : ''"
SCORE = f"isValid(datum.value) ? format(datum.value, '.5~g') + ({ERROR}) + ({NULL}) : 'none'"
# The bright half of viridis, where text must be dark, lies at the low end if small scores mean similar.
BRIGHT = f"((datum.value - {LOW}) / ({HIGH} - {LOW}) > 0.6) != ranges[estimator].reverse"
SMALL = f"max(length(datum.layers_a), length(datum.layers_b)) <= {NUMBERED_LAYERS}"
# A pair of other models may lack the layer that was marked last.
KNOWN = "hover.layer_a && indexof(datum.layers_a, hover.layer_a[0]) >= 0"
MARKED = f"{KNOWN} ? hover.layer_a[0] : peek(datum.layers_a)"


def heat_chart(table: ScoreTable) -> dict[str, Any] | None:
    """Return the heat map of layer pairs over a profile of the marked row; None if no pairs were scored."""
    blocks = [block for block in table.blocks if block.layers_b is not None and block.columns == "layers"]
    if not blocks:
        return None
    alt = require_extra("altair", "report")
    names = {checkpoint: table.layers(checkpoint) for checkpoint in table.checkpoints}
    short = {checkpoint: dict(zip(full, shorten(full).short, strict=True)) for checkpoint, full in names.items()}
    records = [_heat_record(block, short[block.checkpoint_a], short[block.checkpoint_b]) for block in blocks]
    several = len(table.checkpoints) > 1
    titles = ("layer of the first checkpoint", "layer of the second checkpoint") if several else ("layer", "layer")
    axis = label_axis(alt, [record["columns"] for record in records])
    spots = {
        "x": alt.X("column:O", sort=None, title=titles[1], axis=axis),
        "y": alt.Y("row:O", sort=None, title=titles[0], scale=alt.Scale(reverse=True), axis=label_axis(alt)),
    }
    layers = [_cells(alt, spots), *_frame(alt, spots)]
    if any(block.p is not None for block in blocks):
        layers.append(_null_dots(alt, spots))
    if any(max(block.values.shape) <= NUMBERED_LAYERS for block in blocks):
        layers.append(_numbers(alt, spots))
    width, height = _sides(blocks)
    heat = alt.layer(*layers).properties(
        width=width, height=height, title=alt.Title(text=alt.expr(TITLE), frame="group")
    )
    chart = alt.vconcat(heat, _profile(alt, spots["x"].title(None), width), spacing=30).add_params(
        *_controls(alt, blocks)
    )
    return finish(alt, chart, records)


def _cells(alt: Any, spots: dict[str, Any]) -> Any:
    ends = {
        "domainMin": alt.expr(LOW),
        "domainMax": alt.expr(HIGH),
        "reverse": alt.expr("ranges[estimator].reverse"),
    }
    bar = alt.Legend(title=None, gradientLength=200)
    colour = alt.Color("value:Q", scale=alt.Scale(scheme="viridis", **ends), legend=bar)
    cells = _unrolled(_rows(alt)).transform_calculate(cell="datum.layer_a + ' / ' + datum.layer_b + ': ' + datum.score")
    cells = cells.mark_rect(invalid="show").encode(
        **spots,
        color=colour,
        tooltip=_tips(alt),
        description="cell:N",
    )
    return cells.add_params(_hover(alt))


def _frame(alt: Any, spots: dict[str, Any]) -> list[Any]:
    """Frame the row and the column of the cell last under the pointer."""
    marked = _unrolled(_rows(alt)).transform_filter(_hover(alt))
    marked = marked.mark_rect(fill=None, stroke=MARK, strokeWidth=2)
    return [marked.encode(y=spots["y"]), marked.encode(x=spots["x"])]


def _null_dots(alt: Any, spots: dict[str, Any]) -> Any:
    """Mark the scores that unrelated rows reach too, below the number where there is one."""
    below = alt.expr(f"{SMALL} ? 14 : 0")
    within = _unrolled(_rows(alt)).transform_filter("isValid(datum.p) && isValid(datum.limit) && datum.p > datum.limit")
    return within.mark_circle(
        size=14, yOffset=below, color="white", stroke="black", strokeWidth=0.6, aria=False
    ).encode(**spots)


def _numbers(alt: Any, spots: dict[str, Any]) -> Any:
    ink = alt.condition(BRIGHT, alt.value("black"), alt.value("white"))
    texts = (
        _unrolled(_rows(alt))
        .transform_filter(f"{SMALL} && isValid(datum.value)")
        .transform_calculate(short="format(datum.value, '.3~g')")
    )
    return texts.mark_text(fontSize=12, aria=False).encode(**spots, text="short:N", color=ink)


def _profile(alt: Any, columns: Any, width: int) -> Any:
    line = _unrolled(_rows(alt).transform_filter(f"datum.layer_a == ({MARKED})"))
    limits = alt.Scale(domainMin=alt.expr(LOW), domainMax=alt.expr(HIGH), zero=False, nice=False)
    curve = line.mark_line(color=MARK, point=alt.OverlayMarkDef(color=MARK, size=30))
    curve = curve.encode(x=columns, y=alt.Y("value:Q", title="score", scale=limits), tooltip=_tips(alt))
    named = line.transform_filter("datum.layer_b == datum.layers_b[0]").transform_calculate(
        name="'Row ' + datum.row + ': ' + datum.layer_a + ' against every column'"
    )
    name = named.mark_text(align="left", baseline="bottom", fontSize=12, fontWeight=600)
    name = name.encode(text="name:N", x=alt.value(0), y=alt.value(-8))
    return alt.layer(curve, name).properties(width=width, height=130)


def _hover(alt: Any) -> Any:
    return alt.selection_point(
        name="hover", on="pointerover", fields=["layer_a", "layer_b"], empty=False, clear="dblclick"
    )


def _rows(alt: Any) -> Any:
    chart = alt.Chart(alt.NamedData("records")).transform_filter("datum.estimator == estimator && datum.pair == pair")
    return chart.transform_flatten(
        ["values", "errors", "nulls", "layers_a", "rows"], ["line", "error_line", "null_line", "layer_a", "row"]
    )


def _unrolled(rows: Any) -> Any:
    cells = rows.transform_flatten(
        ["line", "error_line", "null_line", "layers_b", "columns"], ["value", "se", "p", "layer_b", "column"]
    )
    return cells.transform_calculate(score=SCORE)


def _tips(alt: Any) -> list[Any]:
    fields = {"layer_a": "row", "layer_b": "column", "score": "score"}
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in fields.items()]


def _controls(alt: Any, blocks: Sequence[ScoreBlock]) -> list[Any]:
    estimators = list(dict.fromkeys(block.estimator for block in blocks))
    pairs = list(dict.fromkeys(block.pair for block in blocks))
    methods = {block.estimator: block.registry_name for block in blocks}
    ranges = {
        name: _ranges([b.values for b in blocks if b.estimator == name], spec_of(methods[name])) for name in estimators
    }
    counts = {block.title: block.n for block in blocks}
    return [
        choice(alt, "estimator", estimators, "Estimator"),
        choice(alt, "pair", pairs, "Checkpoints"),
        alt.param(name="fit", value=False, bind=alt.binding_checkbox(name="Fit colours to the data")),
        alt.param(name="ranges", value=ranges),
        alt.param(name="counts", value=counts),
        alt.param(name="notes", value={block.title: null_note(block.p) for block in blocks}),
    ]


def _ranges(values: Sequence[np.ndarray], spec: Any | None) -> dict[str, Any]:
    flat = np.concatenate([part.ravel() for part in values])
    reverse = larger_is_similar(spec) is False
    return {"bounds": colour_range(flat, spec), "data": colour_range(flat), "reverse": reverse}


def _sides(blocks: Sequence[ScoreBlock]) -> tuple[int, int]:
    rows, columns = (max(block.values.shape[axis] for block in blocks) for axis in (0, 1))
    longest = max(rows, columns)
    return max(160, SIDE * columns // longest), max(160, SIDE * rows // longest)


def _heat_record(block: ScoreBlock, short_a: dict[str, str], short_b: dict[str, str]) -> dict[str, Any]:
    layers_b = block.layers_b or ()
    return {
        "estimator": block.estimator,
        "pair": block.pair,
        "layers_a": block.layers_a,
        "layers_b": layers_b,
        "rows": [short_a[name] for name in block.layers_a],
        "columns": [short_b[name] for name in layers_b],
        "values": [plain_numbers(line) for line in block.values],
        "errors": _lines(block.se, block),
        "nulls": _lines(block.p, block),
        "limit": null_limit(block.p),
    }


def _lines(values: np.ndarray | None, block: ScoreBlock) -> list[list[float | None]]:
    known = np.full(block.values.shape, np.nan) if values is None else values
    return [plain_numbers(line) for line in known]
