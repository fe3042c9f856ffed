"""Files of tensors that are there whole or not at all, and that tell when a bit of them has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from tdprobe.errors import ConfigError

VERSION = 1
# The header is kept as text under this name of a safetensors file, and begins with the checksum of everything.
_ENTRY, _OPENING, _BLANK = "tdprobe", '{"blake2b":"', "0" * 32


def write(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to one safetensors file, atomically.

    Args:
        path: Where to; a file that is there is replaced when the new one is on the disk.
        kind: What the file holds, such as ``"tdprobe.state"``; reading asks for it.
        tensors: By name; on any device.
        header: What JSON can hold.

    Raises:
        ConfigError: The path cannot be written, or the header does not fit into JSON.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"cannot write {str(path)!r}: it is a folder; add a file name")
    tensors = _plain(tensors)
    metadata = {_ENTRY: _text(kind, tensors, header)}
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        save_file(tensors, draft, metadata)
        # Who may read the file is for the user's system to say, not for a library.
        draft.chmod(mode)
        _put(draft, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "choose a folder that you can write to" if path.parent.is_dir() else "create the folder first"
        raise ConfigError(f"cannot write {str(path)!r}: {reason}; {advice}") from error
    finally:
        draft.unlink(missing_ok=True)


def read(path: str | Path, kind: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote and check it.

    Args:
        path: The file.
        kind: What it must hold.
        what: Words for that, for messages.

    Returns:
        The tensors, on the CPU, and the header.

    Raises:
        ConfigError: The file is missing, damaged, of another kind, or of a version that this one does not read.
    """
    source = repr(str(path))
    try:
        with safe_open(path, framework="pt") as handle:
            text = (handle.metadata() or {}).get(_ENTRY, "")
            # What is mapped from a file changes with it.
            tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _unreadable(source, what, error) from error
    return tensors, _checked(source, kind, what, tensors, text)


def pack(kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """Return what `write` would write."""
    tensors = _plain(tensors)
    return save(tensors, {_ENTRY: _text(kind, tensors, header)})


def unpack(data: bytes, kind: str, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Undo `pack`, with the checks of `read`.

    Args:
        data: The bytes.
        kind: What they must hold.
        source: Where they are from, for messages.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + size])["__metadata__"][_ENTRY]
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(source, kind, error) from error
    return tensors, _checked(source, kind, kind, tensors, text)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Two names for one memory are two tensors here, and a part of a large one does not bring the rest along.
    return {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


def _text(kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    try:
        rest = json.dumps({"format": kind, "version": VERSION, **header}, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"meta does not fit into JSON: {error}; use text, finite numbers, lists, and dicts"
        ) from error
    text = f'{_OPENING}{_BLANK}",{rest[1:]}'
    return text.replace(_BLANK, _digest(text, tensors), 1)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _checked(source: str, kind: str, what: str, tensors: Mapping[str, Tensor], text: str) -> dict[str, Any]:
    if not text.startswith(_OPENING):
        raise ConfigError(f"{source} is a safetensors file, but not of tdprobe; give {what}")
    start, stop = len(_OPENING), len(_OPENING) + len(_BLANK)
    if _digest(text[:start] + _BLANK + text[stop:], tensors) != text[start:stop]:
        raise ConfigError(
            f"{source} is damaged: its checksum does not fit what it holds; copy it again or save it anew"
        )
    header = json.loads(text)
    if header["format"] != kind:
        raise ConfigError(f"{source} holds {header['format']!r}, not {kind!r}; give {what}")
    if header["version"] != VERSION:
        raise ConfigError(
            f"{source} has format version {header['version']!r}, this tdprobe reads version {VERSION}; "
            "read it with the tdprobe that wrote it, or save it anew"
        )
    return header


def _unreadable(source: str, what: str, error: Exception) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        return ConfigError(f"there is no file {source}; give {what}")
    return ConfigError(f"{source} cannot be read ({error}); it is cut short, damaged, or not {what}")


def _put(draft: Path, path: Path) -> None:
    """Bring a finished draft to its place, on the disk before the name is."""
    _flush(draft)
    draft.replace(path)
    if os.name == "posix":
        _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        _put(draft, path)
    finally:
        draft.unlink(missing_ok=True)
