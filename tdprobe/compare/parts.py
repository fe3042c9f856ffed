"""What units of work leave behind: parts that merge, in files that are whole or absent."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from tdprobe.compare.ranks import difference
from tdprobe.errors import ConfigError
from tdprobe.stats import files
from tdprobe.stats.saved import flatten, restore
from tdprobe.stats.state import State
from tdprobe.tables.score_json import as_json_value

KIND = "tdprobe.part"


@dataclass(frozen=True)
class Part:
    """Hold the states of some units; a value that merges, with ``Part()`` for no unit at all.

    Args:
        widths: Width of each layer by its name; empty where no row came.
        counts: Numbers that add up, such as rows.
        states: For each thing that is kept, one state per group of rows, ``None`` where a group has none.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    states: tuple[tuple[State | None, ...], ...] = ()

    def merge(self, other: Part) -> Part:
        """Return the part of both, this one's rows first.

        Raises:
            ConfigError: They are of other layers.
        """
        if self.widths and other.widths and self.widths != other.widths:
            name, ours, theirs = difference(dict(self.widths), dict(other.widths)) or ("", "", "")
            raise ConfigError(
                f"layers must run in every forward pass, at one width, to be scored together; {name!r} had width "
                f"{ours} and then {theirs}"
            )
        counts = {key: self.counts.get(key, 0) + other.counts.get(key, 0) for key in {**self.counts, **other.counts}}
        pairs = zip_longest(self.states, other.states, fillvalue=())
        states = tuple(tuple(_merged(a, b) for a, b in zip_longest(ours, theirs)) for ours, theirs in pairs)
        return Part(self.widths or other.widths, counts, states)

    def encode(self, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and a header for a file, in which ``about`` is noted as well."""
        tensors: dict[str, Tensor] = {}
        trees = [
            [
                None if state is None else flatten(state, tensors, f"{source}/{group}")
                for group, state in enumerate(held)
            ]
            for source, held in enumerate(self.states)
        ]
        return tensors, {"widths": dict(self.widths), "counts": dict(self.counts), "states": trees, **about}

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], source: str) -> Part:
        """Undo `encode`."""
        states = tuple(
            tuple(None if tree is None else restore(tree, tensors, source) for tree in trees)
            for trees in header["states"]
        )
        return cls(header["widths"], header["counts"], states)


def _merged(a: State | None, b: State | None) -> State | None:
    return b if a is None else a if b is None else a.merge(b)


class PartFolder:
    """Keep one file per unit in a folder, which belongs to one run: a manifest says which.

    Args:
        folder: The folder; made when the first part is written.
        config: What the numbers depend on, JSON-able.

    Raises:
        ConfigError: The folder has the parts of another run; the message names the first difference.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self._manifest = folder / "manifest.json"
        self.config = as_json_value(dict(config), "the configuration")
        self._check()

    def _check(self) -> None:
        if not self._manifest.is_file():
            return
        try:
            found = json.loads(self._manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{str(self._manifest)!r} is damaged ({error}); delete the folder") from error
        if gap := difference(found, self.config):
            name, theirs, ours = gap
            raise ConfigError(
                f"{str(self.folder)!r} holds parts of another run, with {name}={theirs!r}; this one has "
                f"{name}={ours!r}: repeat that run, delete the folder, or choose another one"
            )

    def path(self, unit: int) -> Path:
        """Return where the part of a unit is, or will be."""
        return self.folder / f"part-{unit:06d}.safetensors"

    def write(self, unit: int, part: Part) -> None:
        """Keep the part of a finished unit.

        Raises:
            ConfigError: The folder cannot be written.
        """
        if not self._manifest.is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                files.write_text(self._manifest, json.dumps(self.config, indent=1))
            except OSError as error:
                raise ConfigError(f"cannot write {str(self._manifest)!r}: {error.strerror}") from error
        files.write(self.path(unit), KIND, *part.encode({"unit": unit}))

    def read(self, unit: int) -> Part:
        """Return the part of a unit.

        Raises:
            ConfigError: The file is damaged, or of another unit.
        """
        path = self.path(unit)
        tensors, header = files.read(path, KIND, "a part that this run wrote")
        if header["unit"] != unit:
            raise ConfigError(f"{str(path)!r} is the part of unit {header['unit']}; delete it")
        return Part.decode(tensors, header, repr(str(path)))

    def has(self, unit: int) -> bool:
        """Tell whether the part of a unit is there and whole; a damaged one will be replaced."""
        if not self.path(unit).is_file():
            return False
        try:
            self.read(unit)
        except ConfigError as error:
            warnings.warn(f"{error}; the unit is computed again", stacklevel=2)
            return False
        return True

    def remove(self, root: Path) -> None:
        """Delete the parts and the manifest, and the folders up to ``root`` where nothing else is in them."""
        for path in [*self.folder.glob("part-*.safetensors"), *self.folder.glob(".*.tmp"), self._manifest]:
            path.unlink(missing_ok=True)
        for folder in (self.folder, *self.folder.parents):
            # What is not empty stays, and another process may have been here first.
            with suppress(OSError):
                folder.rmdir()
            if folder == root:
                return


def pack(part: Part, unit: int) -> bytes:
    """Return a part as bytes, for another process."""
    return files.pack(KIND, *part.encode({"unit": unit}))


def unpack(data: bytes, unit: int, source: str) -> Part:
    """Undo `pack`.

    Raises:
        ConfigError: The bytes are damaged, or of another unit.
    """
    tensors, header = files.unpack(data, KIND, source)
    if header["unit"] != unit:
        raise ConfigError(f"{source} is the part of unit {header['unit']}, and that of unit {unit} was due")
    return Part.decode(tensors, header, source)
