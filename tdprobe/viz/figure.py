"""Figures that pyplot does not know, and ticks that stay readable."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdprobe.errors import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

TICKS = 40


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of ``size`` inches that is freed with its last reference."""
    figure = require_extra("matplotlib.figure", "plot").Figure(figsize=size, layout="constrained")
    # Notebooks draw pyplot's figures only; with this method they show ours as well.
    figure._repr_png_ = lambda: _png(figure)
    return figure


def canvas(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return the axes to draw into and their figure, made anew if there are none."""
    if ax is not None:
        return ax.figure, ax  # ty: ignore[invalid-explicit-return]
    figure = new_figure(size)
    return figure, figure.add_subplot()


def thin_ticks(axis: Axis, labels: Sequence[str], ticks: int = TICKS) -> None:
    """Label every position, or every k-th beyond ``ticks`` positions; turn long names on the x axis."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, len(labels)) if len(labels) <= s * ticks)
    spots = range(0, len(labels), step)
    turned = axis.get_label_position() in ("bottom", "top") and max(map(len, labels)) * len(spots) > 70
    size = 9 if len(spots) <= 16 else 7.5
    options: dict[str, Any] = {"rotation": 90 if turned else 0, "fontsize": size}
    axis.set_ticks(list(spots), [labels[i] for i in spots], **options)


def fold(text: str, inches: float) -> str:
    """Break a title into lines that fit ``inches`` at the usual text size."""
    return "\n".join(textwrap.wrap(text, max(20, int(12 * inches)), break_on_hyphens=False)) or text


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
