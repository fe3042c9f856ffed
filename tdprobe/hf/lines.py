"""Read a file of texts line by line, and say exactly which byte, line or field is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tdprobe.errors import ConfigError, closest

_JSON_LINES = (".jsonl", ".ndjson")


def check_file(path: Path, field: str | None) -> Path:
    """Return ``path`` if it is a file that can hold texts, else say what is wrong with it."""
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".txt", *_JSON_LINES))
        holds = f"; it holds {', '.join(map(repr, inside[:5]))}" if inside else ""
        raise ConfigError(f"{str(path)!r} is a folder{holds}; give one file.")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = " or ".join(repr(str(path.parent / name)) for name in closest(path.name, beside))
        hint = f"did you mean {near}?" if near else "check the path."
        raise ConfigError(f"there is no file {str(path)!r}; {hint}")
    if path.suffix.lower() not in (".txt", *_JSON_LINES):
        raise ConfigError(f"got the file {str(path)!r}; its suffix must be .txt, .jsonl or .ndjson.")
    if field is not None and path.suffix.lower() == ".txt":
        raise ConfigError(f"got field={field!r} with {str(path)!r}; a .txt file has no fields: leave it out.")
    return path


def texts_in(path: Path, field: str | None) -> Iterator[str]:
    """Yield the texts of a checked file."""
    for number, line in _lines(path):
        if path.suffix.lower() == ".txt":
            yield line
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            said = f"{error.msg} at column {error.colno}"
            raise ConfigError(f"{where} is not JSON ({said}): {line[:60]!r}; mend or drop it.") from error
        yield text_of(where, row, field or "text")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines with their numbers."""
    # Only newlines part lines: inside a JSON string the other Unicode line separators are text.
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw, offset, path, number).lstrip("\ufeff").strip()
            offset += len(raw)
            if line:
                yield number, line


def _decode(raw: bytes, offset: int, path: Path, number: int) -> str:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at, wide = offset + error.start, offset + error.start == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    else:
        if "\0" not in line:
            return line
        at, wide = offset + raw.index(0), True
    encoding = "UTF-16" if wide else "WINDOWS-1252"
    raise ConfigError(
        f"{str(path)!r} is not UTF-8 text: byte {at} (line {number}) cannot be read. If it is {encoding}, "
        f"convert it: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"
    )


def text_of(where: str, row: Any, field: str) -> str:
    """Return the text of one parsed JSON row; ``where`` names the row in errors."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is a JSON {type(row).__name__}; an object with {field!r} is needed.")
    if field not in row:
        near = closest(field, row)
        hint = f"; did you mean {near[0]!r}?" if near else "; say which one is the text with field= (--field)."
        raise ConfigError(f"{where} has no field {field!r}{hint} Its fields: {', '.join(row) or 'none'}.")
    text = row[field]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where} holds {text!r} in field {field!r}; a text with a character is needed.")
    return text
