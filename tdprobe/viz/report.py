"""One HTML file that shows a score table, with everything inside."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdprobe.errors import require_extra
from tdprobe.tables.score_json import atomic_text
from tdprobe.tables.summary import describe
from tdprobe.viz.curve_chart import curve_chart
from tdprobe.viz.heat_chart import heat_chart
from tdprobe.viz.labels import shorten

if TYPE_CHECKING:
    from tdprobe.tables.table import ScoreTable

TABLE_SCORES = 2500
DOWNLOAD_CHARACTERS = 5_000_000
PACKAGES = ("tdprobe", "torch", "transformers", "numpy", "altair")


def write_report(table: ScoreTable, path: str | Path) -> Path:
    """Write one self-contained HTML file: interactive heat map, curves, scores, what was run.

    The file holds its own JavaScript and asks no network for anything.

    Args:
        table: Scores to show.
        path: File to write, whole or not at all; its folder must exist.

    Returns:
        The path that was written.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
        ConfigError: The path cannot be written; found out before the charts are made.
    """
    for module in ("altair", "vl_convert", "jinja2"):
        require_extra(module, "report")
    with atomic_text(path) as handle:
        handle.write(_page(table))
    return Path(path)


def _page(table: ScoreTable) -> str:
    jinja = require_extra("jinja2", "report")
    source = resources.files("tdprobe.viz").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = jinja.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    scores = table.to_json()
    charts = {"heat": heat_chart(table), "curves": curve_chart(table)}
    return template.render(
        title=f"Layer scores: {', '.join(table.checkpoints) or 'none'}",
        charts={name: chart for name, chart in charts.items() if chart is not None},
        script=_script(),
        summaries=[(block, *describe(block)) for block in table.blocks],
        patterns=_patterns(table),
        tables=table.blocks if len(table) <= TABLE_SCORES else (),
        scores=json.loads(scores) if len(scores) <= DOWNLOAD_CHARACTERS else None,
        run=list(_flat(table.meta)),
        versions=list(_versions()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _patterns(table: ScoreTable) -> dict[str, list[str]]:
    """Map what the short labels leave out to the checkpoints it is left out of."""
    found: dict[str, list[str]] = {}
    for name in table.checkpoints:
        found.setdefault(shorten(table.layers(name)).pattern, []).append(name)
    found.pop("", None)
    return found


def _script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that defines their globals."""
    altair = require_extra("altair", "report")
    version = "_".join(altair.SCHEMA_VERSION.split(".")[:2])
    return require_extra("vl_convert", "report").javascript_bundle(vl_version=version)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            # Run from a checkout, tdprobe is the only one that may be here without being installed.
            if name == "tdprobe":
                yield name, "from source"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and not any(isinstance(part, (dict, list)) for part in value):
        yield path, ", ".join(map(str, value))
    elif path:
        yield path, value if isinstance(value, str) else json.dumps(value)
