"""States in files: what a stream left behind, kept for later or for another machine."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from tensordict import TensorDict, TensorDictBase, is_tensorclass
from torch import Tensor

from tdprobe.errors import ConfigError, closest
from tdprobe.stats import files
from tdprobe.stats.state import State, Statistic

KIND, WHAT = "tdprobe.state", "a file that State.save wrote"


@dataclass(frozen=True)
class SavedState:
    """Hold a state with what its file says about it.

    Attributes:
        state: The state, on the CPU.
        statistic: Class and configuration of the statistic, as `describe_statistic` gives them, or ``None``.
        layers: Names of its layers, in order; empty where they were not given.
        meta: What the one who saved it noted.
    """

    state: State
    statistic: dict[str, Any] | None = None
    layers: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


def save_state(
    path: str | Path,
    state: State,
    *,
    statistic: Statistic | None = None,
    layers: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write a state to one safetensors file, atomically and with a checksum.

    Args:
        path: The file.
        state: Any state, of this package or another.
        statistic: What it belongs to; `load_state` compares.
        layers: Names of its layers.
        meta: What else to note, such as the model and its fingerprint; fits into JSON.

    Raises:
        ConfigError: The path cannot be written, or ``meta`` does not fit into JSON.
    """
    tensors: dict[str, Tensor] = {}
    header = {
        "state": flatten(state, tensors),
        "statistic": None if statistic is None else describe_statistic(statistic),
        "layers": list(layers),
        "meta": dict(meta or {}),
    }
    files.write(path, KIND, tensors, header)


def load_state(path: str | Path, statistic: Statistic | None = None) -> State:
    """Read a state that was saved, to merge it, score it, or go on with its stream.

    Args:
        path: The file.
        statistic: What the state must belong to.

    Raises:
        ConfigError: The file is damaged or holds something else, its class is not loaded, or the statistic is another.

    Example:
        >>> import torch, tempfile
        >>> from tdprobe.stats import Moments
        >>> x, ids = torch.randn(9, 2), torch.arange(9)
        >>> state = Moments().update(Moments().init([x], ids), [x], ids)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state.save(f"{folder}/moments", statistic=Moments())
        ...     again = load_state(f"{folder}/moments", Moments())
        >>> torch.equal(again.scatters["0"], state.scatters["0"])
        True
    """
    found = read_state(path)
    if statistic is not None:
        _check_statistic(repr(str(path)), found.statistic, describe_statistic(statistic))
    return found.state


def read_state(path: str | Path) -> SavedState:
    """Read a state with its layer names and notes.

    Raises:
        ConfigError: The file is damaged or holds something else, or its class is not loaded.
    """
    tensors, header = files.read(path, KIND, WHAT)
    state = restore(header["state"], tensors, repr(str(path)))
    return SavedState(state, header["statistic"], tuple(header["layers"]), header["meta"])


def describe_statistic(statistic: Statistic) -> dict[str, Any]:
    """Return class and configuration of a statistic, JSON-able.

    Example:
        >>> from tdprobe.stats import Reservoir
        >>> describe_statistic(Reservoir(size=8))
        {'class': 'tdprobe.stats.reservoir.Reservoir', 'size': 8, 'seed': 0}
    """
    config = {f.name: getattr(statistic, f.name) for f in fields(statistic)} if is_dataclass(statistic) else {}
    return {"class": _path(type(statistic)), **{name: _json(value) for name, value in config.items()}}


def flatten(state: State, tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Put the tensors of a state into ``tensors``, and return what else it takes to restore it, JSON-able.

    Args:
        state: Any state.
        tensors: Receives the tensors, under names that begin with ``prefix``.
        prefix: Tells several states in one file apart.
    """
    return _encode(state, tensors, prefix)


def restore(tree: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> State:
    """Undo `flatten`.

    Args:
        tree: What `flatten` returned.
        tensors: What it put aside.
        source: Where both are from, for messages.

    Raises:
        ConfigError: The class of the state is not loaded.
    """
    return _decode(tree, tensors, source)


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, State):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        kind = {"class": _path(type(value))}
    elif isinstance(value, TensorDictBase) and not is_tensorclass(value):
        parts, kind = dict(value.items()), {}
    else:
        return {"value": _plain_value(value, name)}
    # Slashes separate the steps of a name, so a key that holds one must not.
    steps = {key: str(key).replace("~", "~0").replace("/", "~1") for key in parts}
    encoded = {key: _encode(part, tensors, f"{name}/{steps[key]}".lstrip("/")) for key, part in parts.items()}
    return {**kind, "batch_size": list(value.batch_size), "fields": encoded}


def _decode(tree: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Any:
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "value" in tree:
        return tree["value"]
    parts = {name: _decode(part, tensors, source) for name, part in tree["fields"].items()}
    if "class" not in tree:
        return TensorDict(parts, batch_size=tree["batch_size"])
    return _state_class(tree["class"], source)(**parts, batch_size=tree["batch_size"])


def _state_class(path: str, source: str) -> Any:
    """Find a class among those that are loaded: a file must not be able to import anything."""
    known = {_path(cls): cls for cls in _subclasses(State)}
    if path not in known:
        package = importlib.import_module("tdprobe.stats")
        for module in pkgutil.iter_modules(package.__path__, "tdprobe.stats."):
            importlib.import_module(module.name)
        known = {_path(cls): cls for cls in _subclasses(State)}
    if path not in known:
        near = closest(path, known)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"{source} holds a state of the class {path!r}, which is not loaded{hint}; import the module that "
            "defines it first"
        )
    return known[path]


def _subclasses(cls: type) -> Iterator[type]:
    for found in cls.__subclasses__():
        yield found
        yield from _subclasses(found)


def _check_statistic(source: str, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    if found is None:
        raise ConfigError(
            f"{source} does not say of which statistic its state is; save it with statistic=, or load it without"
        )
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{source} was saved with {name}={found.get(name)!r}, and {name}={wanted.get(name)!r} is wanted; "
                "states merge only where the statistics are equal"
            )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _json(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return repr(value)


def _plain_value(value: Any, name: str) -> Any:
    if _json(value) != value:
        raise ConfigError(
            f"field {name!r} of the state holds a {type(value).__name__}; a state that is saved holds tensors, "
            "tensordicts, states, and what JSON can hold"
        )
    return value
