"""Score tables as a few lines of text or HTML."""

from __future__ import annotations

from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tdprobe import registry
from tdprobe.errors import ConfigError

if TYPE_CHECKING:
    from tdprobe.tables.block import ScoreBlock
    from tdprobe.tables.table import ScoreTable

SHOWN_BLOCKS = 6
SHOWN_LAYERS = 40
NUMBERED_LAYERS = 8
# One rule for all cells: with the style on each, 900 cells would cost 170 kB in every saved notebook.
STYLE = (
    "<style>.tdprobe-heat{{border-collapse:collapse;line-height:1}}.tdprobe-heat caption{{text-align:left}}"
    ".tdprobe-heat td{{padding:0;min-width:{side}px;height:{side}px;text-align:center;color:#111}}"
    ".tdprobe-heat td,.tdprobe-heat th{{font-size:11px}}"
    ".tdprobe-heat th{{text-align:right;padding:0 4px}}</style>"
)


class Extremes(NamedTuple):
    """Smallest and largest score of a block and the layers they belong to."""

    low: float
    high: float
    low_at: str
    high_at: str


def spec_of(estimator: str) -> Any | None:
    """Return what the registry says about an estimator, None if it does not know the name."""
    # A second instance of one estimator is labelled cka-2.
    for name in (estimator, estimator.rpartition("-")[0]):
        with suppress(ConfigError):
            return registry.get(name).spec
    return None


def larger_is_similar(spec: Any | None) -> bool | None:
    """Say whether larger scores mean more similar layers; None if the scores say nothing of similarity."""
    return spec.larger_is_similar if spec is not None else None


def extremes(block: ScoreBlock) -> Extremes | None:
    """Find the ends of a block, leaving out a layer compared with itself; None without a finite score."""
    values = np.where(np.isfinite(block.values), block.values, np.nan)
    if len(block.sides) == 2 and block.layers_b is not None and block.checkpoint_a == block.checkpoint_b:
        own = np.array(block.layers_a)[:, None] == np.array(block.layers_b)[None, :]
        values = np.where(own, np.nan, values)
    if np.isnan(values).all():
        return None
    low, high = np.nanargmin(values), np.nanargmax(values)
    return Extremes(float(values.flat[low]), float(values.flat[high]), _name(block, low), _name(block, high))


def describe(block: ScoreBlock) -> tuple[str, str]:
    """Say in words where a block has its largest and its smallest score."""
    ends = extremes(block)
    if ends is None:
        return "no score beyond a layer with itself", ""
    similar = larger_is_similar(spec_of(block.registry_name)) if block.layers_b is not None else None
    top, bottom = {True: ("most similar", "least similar"), False: ("least similar", "most similar")}.get(
        similar, ("highest", "lowest")
    )
    return f"{top}: {ends.high_at} ({ends.high:.3g})", f"{bottom}: {ends.low_at} ({ends.low:.3g})"


def as_text(table: ScoreTable) -> str:
    """Return one line about the table and one about each of its first blocks."""
    lines = [_headline(table)]
    for block in table.blocks[:SHOWN_BLOCKS]:
        lines.append(f"  {block.title}, {_size(block)}; {'; '.join(filter(None, describe(block)))}")
    if len(table.blocks) > SHOWN_BLOCKS:
        lines.append(f"  ... and {len(table.blocks) - SHOWN_BLOCKS} more")
    return "\n".join(lines)


def as_html(table: ScoreTable) -> str:
    """Return a short summary and a small heat table of the first block."""
    lines = []
    for block in table.blocks[:SHOWN_BLOCKS]:
        cells = (block.title, _size(block), *describe(block))
        lines.append("<tr>" + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in cells) + "</tr>")
    more = len(table.blocks) - SHOWN_BLOCKS
    rest = f"<p>... and {more} more; see <code>.rows()</code></p>" if more > 0 else ""
    heat = _heat_table(table.blocks[0]) if table.blocks else ""
    return f"<div><p><b>{escape(_headline(table))}</b></p><table>{''.join(lines)}</table>{rest}{heat}</div>"


def _headline(table: ScoreTable) -> str:
    return (
        f"ScoreTable: {len(table)} scores; estimators: {', '.join(table.estimators) or 'none'}; "
        f"checkpoints: {', '.join(table.checkpoints) or 'none'}"
    )


def _size(block: ScoreBlock) -> str:
    if block.columns == "targets":
        layers, targets = block.values.shape
        return f"{layers} layers × {targets} target{'s' * (targets != 1)}, n={block.n}"
    return " × ".join(map(str, block.values.shape)) + f" layers, n={block.n}"


def _name(block: ScoreBlock, flat: np.intp) -> str:
    spot = np.unravel_index(flat, block.values.shape)
    if block.layers_b is None:
        return block.layers_a[spot[0]]
    return f"{block.layers_a[spot[0]]} / {block.layers_b[spot[1]]}"


def _heat_table(block: ScoreBlock) -> str:
    if max(block.values.shape) > SHOWN_LAYERS:
        return ""
    columns = block.layers_b or (block.estimator,)
    grid = block.values.reshape(len(block.layers_a), -1)
    finite = grid[np.isfinite(grid)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    numbered = max(grid.shape) <= NUMBERED_LAYERS
    rows = []
    for name, line in zip(block.layers_a, grid.tolist(), strict=True):
        cells = "".join(
            _heat_cell(f"{name} / {column}: {score:.4g}", score, (score - low) / ((high - low) or 1.0), numbered)
            for column, score in zip(columns, line, strict=True)
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    note = f"{block.title}; rows and columns in layer order, darker is higher ({low:.3g} to {high:.3g})"
    style = STYLE.format(side=44 if numbered else 12)
    return f'{style}<table class="tdprobe-heat"><caption>{escape(note)}</caption>{"".join(rows)}</table>'


def _heat_cell(title: str, score: float, share: float, numbered: bool) -> str:
    colour = f"rgba(33,113,181,{0.05 + 0.75 * share:.2f})" if np.isfinite(score) else "#bbb"
    return f'<td title="{escape(title)}" style="background:{colour}">{f"{score:.3g}" if numbered else ""}</td>'
