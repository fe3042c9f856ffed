"""Heat maps of scores between layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tdprobe.errors import ConfigError, require_extra
from tdprobe.tables.summary import larger_is_similar, spec_of
from tdprobe.viz.figure import canvas, fold, new_figure, thin_ticks
from tdprobe.viz.labels import colour_range, null_limit, null_note, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from tdprobe.tables.block import ScoreBlock

NUMBERED_LAYERS = 8
NO_SCORE = "0.75"
# Inches of the longer side of the cells, and the least for a side.
SIDE, LEAST = 4.6, 2.4


def heatmap(
    values: np.ndarray,
    layers_a: Sequence[str],
    layers_b: Sequence[str],
    *,
    estimator: str = "score",
    checkpoint_a: str = "",
    checkpoint_b: str = "",
    n: int | None = None,
    spec: Any | None = None,
    p: np.ndarray | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw scores between layers, depth growing to the right and upwards.

    A dot marks a score that unrelated rows reach in more than one of 20 permutations.

    Args:
        values: Scores, (La, Lb); NaN is drawn grey.
        layers_a: Names of the rows, in depth order.
        layers_b: Names of the columns, in depth order.
        estimator: Name for the title and the colour bar.
        checkpoint_a: Checkpoint of the rows.
        checkpoint_b: Checkpoint of the columns.
        n: Samples behind the scores.
        spec: Registry entry of the estimator: its bounds set the colour range, its meaning the direction.
        p: Share of permutations that score at least as similar, (La, Lb); NaN where it is not known.
        title: Text above the picture, instead of the names.
        ax: Axes to draw into; a new figure if left out.

    Returns:
        The figure, not known to pyplot when it is new.

    Raises:
        ConfigError: The values do not fit the names.

    Example:
        >>> figure = heatmap(np.eye(2), ["h.0", "h.1"], ["h.0", "h.1"], estimator="cka", n=64)
        >>> figure.axes[0].get_title(loc="left"), figure.axes[0].get_xlabel()
        ('cka (n = 64)', 'layer (h.*)')
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(layers_a), len(layers_b)):
        raise ConfigError(f"{values.shape} scores do not fit {len(layers_a)} rows and {len(layers_b)} columns.")
    width, height = _cells(layers_a, layers_b) if ax is None else (SIDE, SIDE)
    figure, ax = canvas(ax, _size(layers_a, layers_b))
    image = _draw(ax, values, (layers_a, layers_b), (checkpoint_a, checkpoint_b), colour_range(values, spec), spec)
    _mark_null(ax, p)
    names = " × ".join(dict.fromkeys(filter(None, (checkpoint_a, checkpoint_b))))
    count = f" (n = {n})" if n is not None else ""
    heading = f"{estimator}{': ' if names else ''}{names}{count}{null_note(p)}" if title is None else title
    # Cells of a tall map stand at the right of their room, which the title needs all of.
    start = min(0.0, 1 - width / (SIDE * len(layers_b) / len(layers_a))) if width < SIDE else 0.0
    ax.set_title(fold(heading, width), loc="left", x=start, fontsize=11)
    _colour_bar(figure, image, [ax], fold(_meaning(estimator, spec), height))
    return figure


def heatmap_grid(blocks: Sequence[ScoreBlock]) -> Figure:
    """Draw the pairs of checkpoints of one estimator side by side in one colour range."""
    columns = min(3, len(blocks))
    lines = -(-len(blocks) // columns)
    figure = new_figure((1.2 + 4.2 * columns, 4.4 * lines))
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    spec = spec_of(blocks[0].registry_name)
    limits = colour_range(np.concatenate([block.values.ravel() for block in blocks]), spec)
    for block, ax in zip(blocks, panels, strict=False):
        owners = (block.checkpoint_a, block.checkpoint_b)
        image = _draw(ax, block.values, (block.layers_a, block.layers_b or ()), owners, limits, spec, ticks=16)
        _mark_null(ax, block.p)
        ax.set_title(fold(f"{' × '.join(owners)} (n = {block.n}){null_note(block.p)}", 3.2), loc="left", fontsize=10)
    for ax in panels[len(blocks) :]:
        ax.set_axis_off()
    _colour_bar(figure, image, list(panels), fold(_meaning(blocks[0].estimator, spec), 3.6))
    return figure


def _mark_null(ax: Axes, p: np.ndarray | None) -> None:
    if p is not None and (limit := null_limit(p)) is not None:
        rows, columns = np.nonzero(np.nan_to_num(p) > limit)
        # Light inside dark shows on every colour; where a cell holds its number, the dot is below.
        below = 0.3 if max(p.shape) <= NUMBERED_LAYERS else 0.0
        ax.scatter(columns, rows - below, s=9, c="white", edgecolors="black", linewidths=0.5)


def _cells(layers_a: Sequence[str], layers_b: Sequence[str]) -> tuple[float, float]:
    """Return the inches that cells have to both sides."""
    rows, columns = len(layers_a), len(layers_b)
    return max(LEAST, SIDE * min(1.0, columns / rows)), max(LEAST, SIDE * min(1.0, rows / columns))


def _size(layers_a: Sequence[str], layers_b: Sequence[str]) -> tuple[float, float]:
    """Return inches that leave the cells square and the names of both sides whole."""
    width, height = _cells(layers_a, layers_b)
    left, below = (0.075 * max(map(len, shorten(names).short)) for names in (layers_a, layers_b))
    return width + 1.9 + left, height + 1.0 + below


def _draw(
    ax: Axes,
    values: np.ndarray,
    layers: tuple[Sequence[str], Sequence[str]],
    checkpoints: tuple[str, str],
    limits: tuple[float, float],
    spec: Any | None,
    ticks: int = 40,
) -> AxesImage:
    colormaps = require_extra("matplotlib", "plot").colormaps
    colours = colormaps["viridis_r" if larger_is_similar(spec) is False else "viridis"].with_extremes(bad=NO_SCORE)
    shown = np.ma.masked_invalid(values)
    image = ax.imshow(shown, cmap=colours, vmin=limits[0], vmax=limits[1], origin="lower", aspect="equal")
    sides = zip((ax.yaxis, ax.xaxis), layers, checkpoints, strict=True)
    for axis, names, checkpoint in sides:
        labels = shorten(names)
        thin_ticks(axis, labels.short, ticks)
        owner = f" of {checkpoint}" if len(set(checkpoints)) > 1 else ""
        text = f"layer{owner} ({labels.pattern})" if labels.pattern else f"layer{owner}"
        axis.set_label_text(fold(text, 2.8))
    if max(values.shape) <= NUMBERED_LAYERS:
        _write_numbers(ax, image, values)
    return image


def _write_numbers(ax: Axes, image: AxesImage, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = image.to_rgba(value)
        # Rec. 709 luminance: dark text on bright cells and the other way round.
        bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
        ax.text(
            column,
            row,
            f"{value:.3g}",
            ha="center",
            va="center",
            color="black" if bright else "white",
            fontsize=9,
        )


def _meaning(estimator: str, spec: Any | None) -> str:
    return f"{estimator} (larger: {spec.larger_means})" if spec is not None and spec.larger_means else estimator


def _colour_bar(figure: Figure, image: AxesImage, panels: list[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.02)
    bar.set_label(label)
