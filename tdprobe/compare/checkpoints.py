"""Checkpoints by object, folder or name, loaded when they are needed."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdprobe import hf
from tdprobe.compare.saved import SavedRows
from tdprobe.errors import ConfigError

# Share of the free memory that checkpoints may take together before they are loaded one at a time.
MEMORY_SHARE = 0.5


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put a model into eval mode; every module gets its own mode back at the end."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(eq=False)
class Checkpoint:
    """A model that is there, or a name to load it by.

    Args:
        name: What the table calls it.
        source: The model, a :class:`tdprobe.hf.LoadedModel`, a name for :func:`tdprobe.hf.load`, or
            :class:`tdprobe.compare.saved.SavedRows`.
        dtype: Dtype to load weights in.
        device: Where to load them.

    Raises:
        ConfigError: The source is none of these.
    """

    name: str
    source: Any
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, (nn.Module, hf.LoadedModel, SavedRows, str, Path)):
            raise ConfigError(
                f"checkpoint {self.name!r} is a {type(self.source).__name__}; give a model, a folder, "
                "'name@revision', or a file of saved rows"
            )

    @property
    def rows(self) -> SavedRows | None:
        """The rows that stand for a model which is not needed any more."""
        return self.source if isinstance(self.source, SavedRows) else None

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory already."""
        return not isinstance(self.source, (str, Path))

    def n_bytes(self) -> int:
        """Return the bytes that loading would take; 0 for what is loaded, or where only a download would tell."""
        return 0 if self.is_loaded else (hf.weights_bytes(self.source) or 0)

    @contextmanager
    def loaded(self) -> Generator[hf.LoadedModel]:
        """Yield the model in eval mode; a model of the user's own gets its mode back at the end."""
        source = self.source
        if isinstance(source, (str, Path)):
            source = hf.load(source, dtype=self.dtype, device=self.device)
        elif isinstance(source, nn.Module):
            source = hf.LoadedModel(source, None, self.name, None)
        with evaluating(source.model):
            yield source


def as_checkpoints(
    models: Mapping[str, Any] | Any, *, dtype: str | torch.dtype | None, device: str | torch.device | None
) -> list[Checkpoint]:
    """Turn what the user gave into checkpoints.

    Raises:
        ConfigError: There is none, one is of no usable type, or a name is no string.
    """
    if not isinstance(models, Mapping):
        models = {"model": models}
    if not models:
        raise ConfigError(
            "there is no checkpoint to compare; give a dict from names to models, folders or 'name@revision'"
        )
    odd = [name for name in models if not isinstance(name, str) or not name]
    if odd:
        raise ConfigError(f"checkpoints are named by strings, got {odd[0]!r}")
    return [Checkpoint(name, _read(source), dtype, device) for name, source in models.items()]


def _read(source: Any) -> Any:
    # Models are folders or names; a file can only be saved rows, and says what it is otherwise.
    is_file = isinstance(source, (str, Path)) and source and Path(source).expanduser().is_file()
    return SavedRows.load(Path(source).expanduser()) if is_file else source


def need_one_at_a_time(checkpoints: list[Checkpoint]) -> bool:
    """Tell whether the checkpoints that are still to load would together take too much of the free memory.

    Raises:
        ConfigError: A name means nothing.
    """
    sizes = [checkpoint.n_bytes() for checkpoint in checkpoints]
    if sum(size > 0 for size in sizes) < 2:
        return False
    return sum(sizes) > MEMORY_SHARE * free_bytes(checkpoints[0].device)


def free_bytes(device: str | torch.device | None) -> int:
    """Return the memory that is free on a device."""
    if str(device).startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info(torch.device(str(device)))[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Where the system does not say, assume a small laptop.
        return 8 * 2**30
