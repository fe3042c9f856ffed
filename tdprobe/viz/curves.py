"""Curves of scores over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tdprobe.errors import ConfigError, require_extra
from tdprobe.viz.figure import canvas, thin_ticks
from tdprobe.viz.labels import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIRECT_LABELS = 12


def curves(
    series: Mapping[str, Sequence[float] | np.ndarray],
    positions: Sequence[str] | None = None,
    *,
    estimator: str = "score",
    axis: str = "layer",
    title: str = "",
    errors: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw one curve per label, such as a layer score over depth or the similarity to a final checkpoint.

    Args:
        series: Label -> values, (L,). All of one length; NaN leaves a gap.
        positions: Names along the horizontal axis, (L,); numbers from 0 if left out.
        estimator: What the vertical axis shows.
        axis: What the horizontal axis shows.
        title: Text above the picture.
        errors: Label -> standard errors, (L,): drawn as a band of two on either side.
        ax: Axes to draw into; a new figure if left out.

    Returns:
        The figure, not known to pyplot when it is new.

    Raises:
        ConfigError: No curve, or curves and positions of different lengths.

    Example:
        >>> curves({"base": [3.0, 8.0, 5.0]}, ["h.0", "h.1", "h.2"]).axes[0].get_xlabel()
        'layer (h.*)'
    """
    lengths = {label: len(values) for label, values in series.items()}
    length = len(positions) if positions is not None else next(iter(lengths.values()), 0)
    if not length or set(lengths.values()) != {length}:
        raise ConfigError(f"curves must have one length, that of their positions ({length}); got {lengths or 'none'}.")
    names = shorten(positions if positions is not None else [str(i) for i in range(length)])
    figure, ax = canvas(ax, (min(11.0, 6.0 + 0.05 * length), 4.2))
    colours = _colours(len(series))
    for (label, values), colour in zip(series.items(), colours, strict=True):
        marker = "o" if length <= 40 else None
        if errors is not None and label in errors:
            middle, spread = np.asarray(values, dtype=float), 2 * np.asarray(errors[label], dtype=float)
            ax.fill_between(range(length), middle - spread, middle + spread, color=colour, alpha=0.18, lw=0)
        ax.plot(np.asarray(values, dtype=float), label=label, color=colour, marker=marker, markersize=3.5, lw=1.6)
    thin_ticks(ax.xaxis, names.short)
    ax.set_xlabel(f"{axis} ({names.pattern})" if names.pattern else axis)
    ax.set_ylabel(estimator)
    ax.set_title(title, loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    if len(series) > 1:
        columns = 1 + (len(series) - 1) // DIRECT_LABELS
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, ncols=columns)
    return figure


def _colours(count: int) -> Any:
    # A sequence of checkpoints has an order; the ordered map shows it, the yellow end is too pale for a line.
    colormaps = require_extra("matplotlib", "plot").colormaps
    return colormaps["viridis"](np.linspace(0.0, 0.85, count)) if count > 1 else ["#2a6f97"]
