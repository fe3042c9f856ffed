"""Score tables as strict JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tdprobe.errors import ConfigError
from tdprobe.tables.block import ARRAYS

if TYPE_CHECKING:
    from tdprobe.tables.block import ScoreBlock
    from tdprobe.tables.table import ScoreTable

FORMAT = "tdprobe.scores"
VERSION = 2
# Version 1 had the scores alone.
READS = (1, 2)


@contextmanager
def atomic_text(path: str | Path) -> Generator[IO[str]]:
    """Open a UTF-8 file that takes the place of ``path`` when the block ends without an error.

    Entering fails at once when the folder cannot be written, before any work is done.

    Raises:
        ConfigError: The folder does not exist or cannot be written, or ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"cannot write {str(path)!r}: it is a folder; add a file name.")
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        handle = draft.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        advice = "choose a folder that you can write to" if path.parent.is_dir() else "create the folder first"
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; {advice}.") from error
    try:
        with handle:
            yield handle
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def as_json_value(value: Any, what: str) -> Any:
    """Return ``value`` as JSON would give it back (tuples as lists, keys as strings).

    Raises:
        ConfigError: ``value`` does not fit into JSON.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} does not fit into JSON: {error}; use text, finite numbers, lists, dicts.") from error


def dump(table: ScoreTable, path: str | Path | None) -> str:
    """Return the table as text and write it; see ``ScoreTable.to_json``."""
    if path is None:
        return _text(table)
    with atomic_text(path) as handle:
        text = _text(table)
        handle.write(text + "\n")
    return text


def load(path_or_text: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the meta data and the fields of each block; see ``ScoreTable.from_json``."""
    source, text = _read(path_or_text)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{source} is not JSON ({error}); give a file that ScoreTable.to_json wrote.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f'{source} is JSON but not a score table: it lacks "format": "{FORMAT}".')
    if found.get("version") not in READS:
        raise ConfigError(
            f"{source} has format version {found.get('version')!r}; this tdprobe reads versions up to {VERSION}: "
            "read it with the tdprobe that wrote it, or write it anew."
        )
    try:
        return dict(found["meta"]), [_decode(block) for block in found["blocks"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{source} is a damaged score table ({type(error).__name__}: {error}); write it anew."
        ) from error


def _text(table: ScoreTable) -> str:
    blocks = [_encode(block) for block in table.blocks]
    found = {"format": FORMAT, "version": VERSION, "meta": table.meta, "blocks": blocks}
    return json.dumps(found, allow_nan=False, ensure_ascii=False)


def _encode(block: ScoreBlock) -> dict[str, Any]:
    fields = {name: getattr(block, name) for name in ("estimator", "checkpoint_a", "checkpoint_b", "route", "method")}
    # A table without targets reads as it always did.
    fields |= {"columns": block.columns} if block.columns != "layers" else {}
    fields |= {
        "layers_a": list(block.layers_a),
        "layers_b": None if block.layers_b is None else list(block.layers_b),
        "n": int(block.n),
        "symmetric": bool(block.symmetric),
    }
    for name in ARRAYS:
        if (held := getattr(block, name)) is not None:
            fields |= _encode_numbers(name, held.ravel())
    return fields


def _encode_numbers(name: str, flat: np.ndarray) -> dict[str, Any]:
    finite = np.isfinite(flat)
    values = np.where(finite, flat, 0.0).tolist()
    for spot in np.flatnonzero(~finite).tolist():
        values[spot] = None
    # JSON has no infinity; null alone would turn it into NaN on the way back.
    signs = {"inf": np.flatnonzero(flat == np.inf), "-inf": np.flatnonzero(flat == -np.inf)}
    infinite = {sign: spots.tolist() for sign, spots in signs.items() if spots.size}
    return {name: values} | ({_infinite(name): infinite} if infinite else {})


def _infinite(name: str) -> str:
    return "infinite" if name == "values" else f"{name}_infinite"


def _decode(found: dict[str, Any]) -> dict[str, Any]:
    names = ("estimator", "checkpoint_a", "checkpoint_b", "layers_a", "layers_b", "n", "symmetric")
    fields = {name: found[name] for name in names} | {name: found.get(name, "") for name in ("route", "method")}
    fields["columns"] = found.get("columns", "layers")
    sides = [found["layers_a"]] + ([] if found["layers_b"] is None else [found["layers_b"]])
    shape = [len(side) for side in sides]
    held = ["values", *(name for name in ARRAYS[1:] if name in found)]
    return fields | {name: _decode_numbers(found, name).reshape(shape) for name in held}


def _decode_numbers(found: dict[str, Any], name: str) -> np.ndarray:
    values = np.array([np.nan if v is None else v for v in found[name]], dtype=np.float64)
    for sign, spots in found.get(_infinite(name), {}).items():
        values[spots] = float(sign)
    return values


def _read(path_or_text: str | Path) -> tuple[str, str]:
    if isinstance(path_or_text, str) and path_or_text.lstrip().startswith(("{", "[")):
        return "the text", path_or_text
    path = Path(path_or_text)
    try:
        return repr(str(path)), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not UTF-8 text ({error}); give a file that to_json wrote.") from error
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; check the path.") from error
