"""Pictures of score tables: heat maps, curves, one interactive HTML report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tdprobe.errors import ConfigError
from tdprobe.tables.summary import spec_of
from tdprobe.viz.curves import curves
from tdprobe.viz.heatmap import heatmap, heatmap_grid
from tdprobe.viz.report import write_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tdprobe.tables.block import ScoreBlock
    from tdprobe.tables.table import ScoreTable


def plot_table(
    table: ScoreTable,
    estimator: str | None = None,
    checkpoint_a: str | None = None,
    checkpoint_b: str | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the scores of one estimator: heat maps of layer pairs, or curves over depth with their errors.

    A supervised estimator has a curve for every target. Scores that unrelated rows reach too are marked, where the
    table has a null.

    Args:
        table: Where the scores are.
        estimator: May be left out where the table has one only.
        checkpoint_a: Checkpoint of the rows; all if left out.
        checkpoint_b: Checkpoint of the columns; all if left out.
        title: Text above the picture, for one pair of checkpoints or curves.
        ax: Axes to draw into, for one pair of checkpoints or curves.

    Returns:
        The figure, not known to pyplot when it is new.

    Raises:
        ConfigError: A name is unknown, the estimator is ambiguous, or several pairs meet one ``ax``.
    """
    if estimator is None and len(table.estimators) != 1:
        raise ConfigError(f"a picture shows one estimator; name one of: {', '.join(table.estimators) or 'none'}.")
    blocks = table.select(estimator, checkpoint_a, checkpoint_b).blocks
    if not blocks:
        blocks = (table.block(estimator, checkpoint_a, checkpoint_b),)
    if blocks[0].layers_b is None or blocks[0].columns == "targets":
        return _curves_of(blocks, title, ax)
    if len(blocks) == 1:
        return _heatmap_of(blocks[0], title, ax)
    if ax is not None or title is not None:
        what = "ax" if ax is not None else "title"
        raise ConfigError(
            f"{len(blocks)} pairs of checkpoints do not fit one {what}; name checkpoint_a and checkpoint_b."
        )
    return heatmap_grid(blocks)


def _heatmap_of(block: ScoreBlock, title: str | None, ax: Axes | None) -> Figure:
    return heatmap(
        block.values,
        block.layers_a,
        block.layers_b or (),
        estimator=block.estimator,
        checkpoint_a=block.checkpoint_a,
        checkpoint_b=block.checkpoint_b,
        n=block.n,
        spec=spec_of(block.registry_name),
        p=block.p,
        title=title,
        ax=ax,
    )


def _curves_of(blocks: Sequence[ScoreBlock], title: str | None, ax: Axes | None) -> Figure:
    layers = list(dict.fromkeys(name for block in blocks for name in block.layers_a))
    series, errors = {}, {}
    for block in blocks:
        for target, values, spread in block.over_depth():
            # With one checkpoint the title names it.
            label = ": ".join(filter(None, (block.checkpoint_a if len(blocks) > 1 or not target else "", target)))
            series[label] = _laid_out(block, values, layers)
            errors |= {} if spread is None else {label: _laid_out(block, spread, layers)}
    if title is None:
        counts = " and ".join(str(n) for n in sorted({block.n for block in blocks}))
        owner = f": {blocks[0].checkpoint_a}" if len(blocks) == 1 else ""
        band = "; band: 2 standard errors" if errors else ""
        title = f"{blocks[0].estimator}{owner} (n = {counts}{band})"
    return curves(series, layers, estimator=blocks[0].estimator, title=title, errors=errors, ax=ax)


def _laid_out(block: ScoreBlock, values: np.ndarray, layers: Sequence[str]) -> list[float]:
    found = dict(zip(block.layers_a, values.tolist(), strict=True))
    return [found.get(name, np.nan) for name in layers]


__all__ = ["curves", "heatmap", "heatmap_grid", "plot_table", "write_report"]
