"""Sampled rows of a checkpoint in a file, to compare with checkpoints that come when it is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from tdprobe.compare.ranks import difference
from tdprobe.errors import ConfigError, closest
from tdprobe.hooks.match import compile_pattern
from tdprobe.stats import files
from tdprobe.stats.reservoir import ReservoirState
from tdprobe.stats.saved import flatten, restore
from tdprobe.stats.state import by_layer

KIND, WHAT = "tdprobe.rows", "a file of rows that SavedRows.save or --save-rows wrote (a model is given by its folder)"


@dataclass(frozen=True)
class SavedRows:
    """Hold the rows of a checkpoint that a comparison sampled, with what it takes to compare them with others.

    Args:
        name: What the table called the checkpoint.
        layers: Its layers, in order.
        state: The rows of each layer and their ids.
        about: What identifies the model, with its fingerprint and tokenizer.
        selection: Which tokens of the texts count.
        data: What each run was over.
    """

    name: str
    layers: tuple[str, ...]
    state: ReservoirState
    about: Mapping[str, Any]
    selection: Mapping[str, Any]
    data: Sequence[Mapping[str, Any]]

    def save(self, path: str | Path) -> None:
        """Write the rows to one safetensors file, atomically and with a checksum.

        Raises:
            ConfigError: The path cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        header = {
            "name": self.name,
            "layers": list(self.layers),
            "state": flatten(self.state, tensors),
            "about": dict(self.about),
            "selection": dict(self.selection),
            "data": [dict(facts) for facts in self.data],
        }
        files.write(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> SavedRows:
        """Read what `save` wrote.

        Raises:
            ConfigError: The file is missing, damaged, or holds something else.
        """
        tensors, header = files.read(path, KIND, WHAT)
        state = cast("ReservoirState", restore(header["state"], tensors, repr(str(path))))
        fields = {key: header[key] for key in ("name", "about", "selection", "data")}
        return cls(layers=tuple(header["layers"]), state=state, **fields)

    def matching(self, pattern: str | None) -> SavedRows:
        """Return the rows of the layers that a pattern matches; ``None`` matches all.

        Raises:
            ConfigError: It matches no layer.
        """
        if pattern is None:
            return self
        kept = [place for place, layer in enumerate(self.layers) if compile_pattern(pattern).match(layer)]
        if not kept:
            near = closest(pattern, self.layers) or list(self.layers[:3])
            raise ConfigError(
                f"the pattern {pattern!r} matches no layer of the saved rows of {self.name!r}; they have, for example, "
                f"{', '.join(map(repr, near))}"
            )
        state = self.state.clone(recurse=False)
        state.rows = by_layer(self.state.rows[str(place)] for place in kept)
        return replace(self, layers=tuple(self.layers[place] for place in kept), state=state)


def check_same_rows(saved: Mapping[str, SavedRows], selection: Mapping[str, Any]) -> None:
    """Refuse saved rows that are of other tokens, or of other data than one another.

    Args:
        saved: By the name of the checkpoint.
        selection: Which tokens count in this comparison.

    Raises:
        ConfigError: They are.
    """
    first = next(iter(saved), None)
    for name, rows in saved.items():
        if gap := difference(dict(rows.selection), dict(selection)):
            raise ConfigError(_unlike(name, gap, "this comparison"))
        if gap := difference(_numbered(rows.data), _numbered(saved[first].data)):  # ty: ignore[invalid-argument-type]
            raise ConfigError(_unlike(name, gap, f"those of {first!r}"))


def one_by_one(saved: Mapping[str, SavedRows], asked: bool | None) -> bool | None:
    """Tell whether checkpoints are run one at a time, which they are where one is a sample already.

    Raises:
        ConfigError: The user asks for the other way.
    """
    if saved and asked is False:
        name = next(iter(saved))
        raise ConfigError(
            f"{name!r} is a sample of rows, which others can meet only by samples of their own; leave "
            "one_at_a_time=False out"
        )
    return True if saved else asked


def check_same_data(saved: Mapping[str, SavedRows], run: int, facts: Mapping[str, Any]) -> None:
    """Refuse a run over other data than that of saved rows.

    Args:
        saved: By the name of the checkpoint.
        run: Number of the run, from 1 on.
        facts: What it is over.

    Raises:
        ConfigError: It is.
    """
    for name, rows in saved.items():
        held = rows.data[run - 1] if run <= len(rows.data) else {}
        if gap := difference(dict(held), dict(facts)):
            raise ConfigError(_unlike(name, gap, "this run"))


def _numbered(data: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {f"run {number}": dict(facts) for number, facts in enumerate(data, 1)}


def _unlike(name: str, gap: tuple[str, Any, Any], other: str) -> str:
    field, theirs, ours = gap
    if field.rpartition(".")[2] == "fingerprint":
        return (
            f"the rows of {name!r} were saved from other data than {other}; compare over the same texts, in the same "
            "order"
        )
    return (
        f"the rows of {name!r} were saved with {field}={theirs!r}, {other} with {field}={ours!r}; rows meet only where "
        "texts, batches and tokens are chosen alike"
    )
