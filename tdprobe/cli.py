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
    model: Annotated[str, typer.Argument(help="Folder, owner/model, owner/model@revision, or demo.")],
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
    """List the estimators by name: what they score, what a larger score means, the paper.

    Those that are supervised read labels or attributes as well, which only LayerScoring in Python can give them.
    """
    from tdprobe import registry

    specs = [registry.get(name).spec for name in registry.names()]
    width = max(len(spec.name) for spec in specs)
    for spec in specs:
        typer.echo(f"{spec.name:<{width}}  {spec.kind:<10}  larger: {spec.larger_means}  [{spec.reference}]")


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(help="Folders, owner/model, owner/model@revision, demo, or saved rows.")
    ],
    data: Annotated[str | None, typer.Option(help="Text file (a sample per line), JSONL, or demo.")] = None,
    layers: Annotated[str | None, typer.Option(help="Pattern of layers; by default the repeated blocks.")] = None,
    estimators: Annotated[str, typer.Option(help="Comma-separated registry names.")] = "cka",
    tokens: Annotated[str, typer.Option(help="all, last, mean, a position, or start:stop.")] = "all",
    skip_first: Annotated[int, typer.Option(help="Tokens at the start of each text that never count.")] = 1,
    max_norm: Annotated[float, typer.Option(help="Leave out rows this many times longer than usual; 0: none.")] = 4.0,
    rescale: Annotated[str | None, typer.Option(help="clip long rows instead, or unit or standard rows.")] = None,
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
    save_rows: Annotated[Path | None, typer.Option(help="Also save sampled rows of MODEL, to compare later.")] = None,
    unit: Annotated[int | None, typer.Option(help="Batches in a unit of work, which processes share.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for another process.")] = 1800.0,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Score every layer of each MODEL against every layer of all of them; torchrun shares the work."""
    _require_writable(out)
    _require_extras()
    if save_rows is not None:
        one_at_a_time = _require_one_model(models, save_rows, one_at_a_time)
    rows: Any = {"tokens": tokens, "skip_first": skip_first, "max_norm": max_norm or None, "mode": mode, "null": null}
    rows["rescale"] = rescale
    reading: Any = {"batch_size": batch_size, "max_length": max_length, "unit": unit, "timeout": timeout}
    loading: Any = {"dtype": dtype, "one_at_a_time": one_at_a_time, "progress": not quiet, "layers": layers}
    names = [name.strip() for name in estimators.split(",") if name.strip()]
    from tdprobe.compare.ranks import launched_ranks

    with launched_ranks(device, timeout) as place:
        options = {**rows, **reading, **loading, "device": place, "estimators": names}
        _compare(models, _texts(models, data, field, limit), data, out, save_rows, options)


def _compare(
    models: list[str], texts: list[str], data: str | None, out: Path, save_rows: Path | None, options: dict[str, Any]
) -> None:
    from tdprobe.compare import LayerComparison
    from tdprobe.compare.ranks import Ranks

    parts = out / "parts"
    kept = parts if Ranks.here().world > 1 or parts.is_dir() else None
    comparison = LayerComparison(dict(zip(_names(models), models, strict=True)), parts=kept, **options)
    comparison.meta |= {"data": Path(data).name, "texts": len(texts)} if data else {}
    interrupted = _run(comparison, texts)
    if comparison.ranks.first:
        table = comparison.scores()
        _write(table, out)
        if save_rows is not None:
            save_rows.parent.mkdir(parents=True, exist_ok=True)
            comparison.saved_rows().save(save_rows)
        typer.echo(f"{table!r}\n{out / 'report.html'}")
    comparison.finish()
    if interrupted:
        raise typer.Exit(130)


def _texts(models: list[str], data: str | None, field: str | None, limit: int | None) -> list[str]:
    from tdprobe import hf

    if data is not None:
        return hf.read_texts(data, field=field, limit=limit)
    if all(Path(model).is_file() for model in models):
        return []
    raise ConfigError("--data is missing: give a text file, a JSONL file, or demo, for the models to run on")


def _run(comparison: LayerComparison, texts: list[str]) -> bool:
    """Run, and tell whether the user cut it short; an interrupt before the first batch is just that."""
    try:
        # Rows that were saved have met all texts already.
        if texts:
            comparison.run(texts)
    except KeyboardInterrupt:
        if comparison.kept:
            typer.echo(f"interrupted; {comparison.kept}", err=True)
            raise typer.Exit(130) from None
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
    short = [_short(model) for model in models]
    names = short if len(set(short)) == len(short) else models
    if len(set(names)) < len(names):
        raise ConfigError(f"a model is given twice: {', '.join(models)}; each is compared with itself anyway")
    return names


def _short(model: str) -> str:
    path = Path(model)
    if path.is_file():
        return path.stem
    return path.resolve().name if os.sep in model and path.exists() else model


def _require_one_model(models: list[str], path: Path, one_at_a_time: bool | None) -> bool:
    """Find out before the work whose rows are to be saved, and that they can be."""
    running = [model for model in models if not Path(model).is_file()]
    if len(running) != 1:
        raise ConfigError(f"--save-rows saves the rows of one model, got {', '.join(running) or 'none'}; save in turns")
    if one_at_a_time is False:
        raise ConfigError("--save-rows needs a sample, which --no-one-at-a-time keeps none of; leave one of them out")
    if path.is_dir():
        raise ConfigError(f"cannot save rows to {str(path)!r}: it is a folder; add a file name")
    _require_writable(path.parent)
    return True


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
