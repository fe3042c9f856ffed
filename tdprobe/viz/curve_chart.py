"""Interactive curves over depth, as a Vega-Lite specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tdprobe.errors import require_extra
from tdprobe.viz.labels import shorten
from tdprobe.viz.vega import choice, finish, label_axis, plain_numbers

SCORE = "format(datum.value, '.5~g') + (isValid(datum.se) ? ' ± ' + format(datum.se, '.2~g') : '')"

if TYPE_CHECKING:
    from tdprobe.tables import ScoreBlock, ScoreTable


def curve_chart(table: ScoreTable) -> dict[str, Any] | None:
    """Return curves over depth: layer estimators, targets, and equal layers of two checkpoints; None without any."""
    records = [record for block in table.blocks for record in _curve_records(block)]
    if not records:
        return None
    alt = require_extra("altair", "report")
    curves = list(dict.fromkeys(record["curve"] for record in records))
    series = list(dict.fromkeys(record["series"] for record in records))
    control = choice(alt, "curve", curves, "Curve")
    title = alt.Title(text=alt.expr("curve"), frame="group")
    lines = alt.Chart(alt.NamedData("records"), title=title).transform_filter("datum.curve == curve")
    lines = lines.transform_flatten(
        ["layers", "labels", "values", "errors"], ["layer", "label", "value", "se"]
    ).transform_calculate(score=SCORE)
    legend = alt.Legend(orient="bottom", columns=2, labelLimit=240, symbolOpacity=1) if len(series) > 1 else None
    # An ordered map, for checkpoints have an order; its yellow end is too pale for a line.
    colours = alt.Scale(scheme=alt.SchemeParams(name="viridis", extent=[0.0, 0.85]))
    crowded = max(len(record["labels"]) for record in records) > 40
    x = alt.X("label:O", sort=None, title="layer", axis=label_axis(alt, [r["labels"] for r in records]))
    colour = alt.Color("series:O", sort=None, title=None, legend=legend, scale=colours)
    # Without an error the band has no width: a chart of nothing would have no scale.
    spread = "(isValid(datum.se) ? 2 * datum.se : 0)"
    band = lines.transform_calculate(
        low=f"isValid(datum.value) ? datum.value - {spread} : null",
        high=f"isValid(datum.value) ? datum.value + {spread} : null",
    )
    band = band.mark_area(opacity=0.18).encode(x=x, y="low:Q", y2="high:Q", color=colour)
    lines = lines.mark_line(point=alt.OverlayMarkDef(size=12 if crowded else 36)).encode(
        x=x,
        y=alt.Y("value:Q", title="score", scale=alt.Scale(zero=False)),
        color=colour,
        tooltip=["series:N", "layer:N", "score:N"],
    )
    both = alt.layer(band, lines) if any(any(r["errors"]) for r in records) else lines
    return finish(alt, both.properties(width=430, height=260).add_params(control), records)


def _curve_records(block: ScoreBlock) -> list[dict[str, Any]]:
    if block.layers_b is None or block.columns == "targets":
        name, layers = block.checkpoint_a, block.layers_a
        return [
            _record(block.estimator, f"{name}: {target}" if target else name, layers, values, errors)
            for target, values, errors in block.over_depth()
        ]
    columns = {name: i for i, name in enumerate(block.layers_b)}
    same = [(i, columns[name]) for i, name in enumerate(block.layers_a) if name in columns]
    if block.checkpoint_a == block.checkpoint_b or not same:
        return []
    values = np.array([block.values[spot] for spot in same])
    errors = None if block.se is None else np.array([block.se[spot] for spot in same])
    layers = [block.layers_a[i] for i, _ in same]
    return [_record(f"{block.estimator}, equal layers of two checkpoints", block.pair, layers, values, errors)]


def _record(
    curve: str, series: str, layers: Sequence[str], values: np.ndarray, errors: np.ndarray | None
) -> dict[str, Any]:
    numbers = {"values": plain_numbers(values), "errors": [None] * len(layers)}
    if errors is not None:
        numbers["errors"] = plain_numbers(errors)
    return {"curve": curve, "series": series, "layers": layers, "labels": shorten(layers).short, **numbers}
