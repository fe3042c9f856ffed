"""The command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tdprobe.errors import ConfigError, require_extra

if TYPE_CHECKING:
    import typer

    from tdprobe.compare import LayerComparison
    from tdprobe.tables import ScoreTable
else:
    typer = require_extra("typer", "cli")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)

# More pictures than this nobody looks through; the report holds them all.
MAX_PICTURES = 24
# What draws the results, and the extra that brings it.
EXTRAS = {"matplotlib": "plot", "altair": "report", "vl_convert": "report", "jinja2": "report"}


@app.callback()
def tdprobe() -> None:
    """Look inside live neural networks: list layers, compare them within and across checkpoints."""


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="Folder, owner/model[@revision], or demo.")],
    every: Annotated[bool, typer.Option("--all", help="One line per module instead of one per kind.")] = False,
) -> None:
    """List the modules of MODEL that can be hooked: pattern to paste, class, output shape."""
    from tdprobe import hf
    from tdprobe.compare.layer_list import list_layers

    loaded = hf.load(model).model
    try:
        found = list_layers(loaded, collapse=not every)
    except ConfigError as error:
        # Names are worth listing for models that take something else than token ids.
        found = list_layers(loaded, lambda b, t: None, collapse=not every)
        typer.echo(f"no shapes: {str(error).rpartition(';')[0]}", err=True)
    width = max(len(info.pattern) for info in found)
    kind = max(len(info.module) for info in found)
    typer.echo(f"{'pattern':<{width}}  {'module':<{kind}}  {'count':>5}  output (b batch, t tokens)")
    for info in found:
        typer.echo(f"{info.pattern:<{width}}  {info.module:<{kind}}  {info.count:>5}  {info.shape or 'did not run'}")


@app.command()
def estimators() -> None:
    """List the estimators by name: what they score, what a larger score means, the paper."""
    from tdprobe import registry

    specs = [registry.get(name).spec for name in registry.names()]
    width = max(len(spec.name) for spec in specs)
    for spec in specs:
        typer.echo(f"{spec.name:<{width}}  {spec.kind:<10}  larger: {spec.larger_means}  [{spec.reference}]")


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Folders, owner/model[@revision], or demo.")],
    data: Annotated[str, typer.Option(help="Text file (a sample per line), JSONL, or demo.")],
    layers: Annotated[str | None, typer.Option(help="Pattern of layers; by default the repeated blocks.")] = None,
    estimators: Annotated[str, typer.Option(help="Comma-separated registry names.")] = "cka",
    tokens: Annotated[str, typer.Option(help="all, last, mean, a position, or start:stop.")] = "all",
    skip_first: Annotated[int, typer.Option(help="Tokens at the start of each text that never count.")] = 1,
    max_norm: Annotated[float, typer.Option(help="Leave out rows this many times longer than usual; 0: none.")] = 4.0,
    mode: Annotated[str, typer.Option(help="robust, or strict as in the papers.")] = "robust",
    null: Annotated[int, typer.Option(help="Permutations that show what unrelated layers score.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for scores.json, report.html and pictures.")] = Path("out"),
    field: Annotated[str | None, typer.Option(help="JSONL field that holds the text.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most so many samples.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens per text at most.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the weights, such as bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="Where models run.")] = None,
    one_at_a_time: Annotated[bool | None, typer.Option(help="Load checkpoints one after the other.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Score every layer of each MODEL against every layer of all of them."""
    from tdprobe import hf
    from tdprobe.compare import LayerComparison

    _require_writable(out)
    _require_extras()
    texts = hf.read_texts(data, field=field, limit=limit)
    names = [name.strip() for name in estimators.split(",") if name.strip()]
    rows: Any = {"tokens": tokens, "skip_first": skip_first, "max_norm": max_norm or None, "mode": mode, "null": null}
    reading: Any = {"batch_size": batch_size, "max_length": max_length}
    loading: Any = {"dtype": dtype, "device": device, "one_at_a_time": one_at_a_time}
    named = dict(zip(_names(models), models, strict=True))
    comparison = LayerComparison(named, layers, names, progress=not quiet, **rows, **reading, **loading)
    comparison.meta |= {"data": Path(data).name, "texts": len(texts)}
    interrupted = _run(comparison, texts)
    table = comparison.scores()
    _write(table, out)
    typer.echo(f"{table!r}\n{out / 'report.html'}")
    if interrupted:
        raise typer.Exit(130)


def _run(comparison: LayerComparison, texts: list[str]) -> bool:
    """Run, and tell whether the user cut it short; an interrupt before the first batch is just that."""
    try:
        comparison.run(texts)
    except KeyboardInterrupt:
        if not comparison.n_rows:
            typer.echo("interrupted before the first batch was done; nothing is written", err=True)
            raise typer.Exit(130) from None
        comparison.meta["interrupted"] = True
        typer.echo(f"interrupted; writing what {comparison.n_rows} rows give", err=True)
        return True
    return False


def _write(table: ScoreTable, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table.to_json(out / "scores.json")
    table.report(out / "report.html")
    names: list[str] = []
    for block in table.blocks[:MAX_PICTURES]:
        names.append(_picture_name(block.key, names))
        table.plot(*block.key).savefig(out / names[-1], dpi=150)
    if len(table.blocks) > MAX_PICTURES:
        typer.echo(f"drew the first {MAX_PICTURES} of {len(table.blocks)} pictures; the report has them all", err=True)


def _picture_name(key: tuple[str, str, str], taken: list[str]) -> str:
    parts = ["".join(c if c.isalnum() or c in "-_." else "_" for c in part)[:60] for part in dict.fromkeys(key)]
    name, count = "-".join(parts), 2
    while f"{name}.png" in taken:
        name, count = f"{'-'.join(parts)}-{count}", count + 1
    return f"{name}.png"


def _names(models: list[str]) -> list[str]:
    """Shorten paths to their last part where that still tells them apart."""
    short = [Path(model).resolve().name if os.sep in model and Path(model).exists() else model for model in models]
    names = short if len(set(short)) == len(short) else models
    if len(set(names)) < len(names):
        raise ConfigError(f"a model is given twice: {', '.join(models)}; each is compared with itself anyway")
    return names


def _require_writable(out: Path) -> None:
    """Find out before the work, not after it, and without leaving a trace."""
    # Of a folder that is still to be made, the nearest one above decides.
    there = next(path for path in (out, *out.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise ConfigError(
            f"cannot write to the output folder {str(out)!r}: {str(there)!r} is a file; choose another --out"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"cannot write to the output folder {str(out)!r}: {str(there)!r} is not writable; choose another --out"
        )


def _require_extras() -> None:
    """Find out before the work whether its results can be drawn."""
    for module, extra in EXTRAS.items():
        require_extra(module, extra)
