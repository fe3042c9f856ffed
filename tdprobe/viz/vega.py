"""Pieces that the interactive charts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NO_SCORE = "#bbbbbb"


def choice(alt: Any, name: str, options: list[str], label: str) -> Any:
    """Return a parameter with a menu of its values."""
    # A menu of one entry only takes room.
    bind = {"bind": alt.binding_select(options=options, name=label)} if len(options) > 1 else {}
    return alt.param(name=name, value=options[0], **bind)


def label_axis(alt: Any, labels: Sequence[Sequence[str]] = ()) -> Any:
    """Return an axis of layer labels, turned where they are long and thinned where they are many."""
    turned = any(len(label) > 4 for part in labels for label in part)
    return alt.Axis(labelAngle=-90 if turned else 0, labelOverlap="parity", ticks=False)


def plain_numbers(values: np.ndarray) -> list[float | None]:
    """Return numbers for JSON, None where there is no finite one."""
    # Six digits are more than a tooltip shows; the full scores are in the download.
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


def finish(alt: Any, chart: Any, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the specification of a chart with its looks and its data, named ``records``."""
    chart = chart.configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
    chart = chart.configure_scale(invalid=alt.ScaleInvalidDataConfig(color={"value": NO_SCORE}))
    chart = chart.configure_view(stroke=None).configure_title(anchor="start", fontSize=14)
    # A menu may bring a legend that is longer than the first one.
    chart = chart.properties(autosize=alt.AutoSizeParams(type="pad", resize=True))
    # The records join after validation, which would walk through every number.
    return chart.to_dict() | {"datasets": {"records": records}}
