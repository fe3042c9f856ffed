"""Find what a model name means: a local folder, or a model on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tdprobe.errors import ConfigError, closest

# Names of the embedded models.
DEMOS = ("demo", "demo-encoder")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """Say where a checkpoint comes from.

    Attributes:
        where: Local folder, or hub id.
        revision: Branch, tag or commit of a hub id; None for its default branch and for folders.
        is_local: Whether ``where`` is a folder.
    """

    where: str
    revision: str | None = None
    is_local: bool = False


def find(name: str) -> Source:
    """Tell a folder from a hub id, and split ``name@revision``.

    A folder wins over a hub id of the same name, and an ``@`` in a folder's name is part of it. Nothing is
    downloaded.

    Args:
        name: Path of a folder, or ``"owner/model"``, or ``"owner/model@revision"``.

    Raises:
        ConfigError: The folder is missing, is empty, holds no model, or is given with a revision.

    Example:
        >>> find("gpt2@main")
        Source(where='gpt2', revision='main', is_local=False)
    """
    path = Path(name).expanduser()
    if name and path.exists():
        _check_folder(name, path)
        return Source(str(path), is_local=True)
    where, at, revision = name.rpartition("@")
    if not at:
        where, revision = name, ""
    elif not where or not revision:
        raise ConfigError(f"got the model name {name!r}; write 'owner/model@revision', or leave the '@' out.")
    elif Path(where).expanduser().exists():
        raise ConfigError(f"{where!r} is a folder, which has no revisions; leave {at + revision!r} out.")
    # A path into a folder that exists is a slip of the pen; asking the network about it would be slow.
    inside = not at and "/" in where and path.parent.is_dir()
    if inside or not _HUB_ID.fullmatch(where):
        raise ConfigError(missing_folder(name))
    return Source(where, revision or None)


def missing_folder(name: str) -> str:
    """Compose the sentence for a folder that does not exist, with its closest siblings."""
    path = Path(name).expanduser()
    shown = f"there is no folder {name!r}"
    if not path.parent.is_dir():
        return f"{shown}, nor its parent {str(path.parent)!r}; check the path."
    siblings = checkpoints_in(path.parent)
    near = closest(path.name, siblings) or siblings[:3]
    if near:
        prefix = name[: len(name) - len(path.name)]
        return f"{shown}; did you mean {' or '.join(repr(prefix + n) for n in near)}?"
    hint = f" For a hub model of that name write {name + '@main'!r}." if _HUB_ID.fullmatch(name) else ""
    return f"{shown}, and no model folder lies in {str(path.parent)!r}; check the path.{hint}"


def checkpoints_in(folder: Path) -> list[str]:
    """Return the names of the sub-folders that hold a ``config.json``, with numbers sorted by value."""

    def by_value(name: str) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    return sorted((config.parent.name for config in folder.glob("*/config.json")), key=by_value)


def weights_in(folder: Path) -> int | None:
    """Return the bytes of the weight files in a folder, or None where there are none."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        sizes = [file.stat().st_size for file in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None


def cached_weights(source: Source) -> int | None:
    """Return the bytes of a hub model's weights if they are in the local hub cache, else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(source.where, revision=source.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return weights_in(Path(folder))


def commit(source: Source) -> str | None:
    """Return the commit of a hub model that has just been loaded, None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if source.is_local:
        return None
    config = try_to_load_from_cache(source.where, "config.json", revision=source.revision)
    # The cache keeps every commit in a folder of its name.
    return Path(config).parent.name if isinstance(config, str) else None


def explain(name: str, source: Source, error: Exception) -> str:
    """Compose the sentence for a checkpoint that transformers could not load."""
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return (
            f"cannot load {name!r}: it needs Python code from its own repository, which tdprobe never runs. "
            "Load it yourself and pass the model object."
        )
    said = said if len(said) <= 400 else said[:400] + " ..."
    if source.is_local:
        return f"cannot load {name!r}: the folder holds config.json, but transformers says: {said}"
    here = checkpoints_in(Path())
    near = closest(name, here)
    meant = closest(name, DEMOS, 1)
    demo = f" Did you mean {meant[0]!r}?" if meant else ""
    folders = f" Model folders here: {', '.join(map(repr, near or here[:3]))}." if here else ""
    revision = f" at revision {source.revision!r}" if source.revision else ""
    return (
        f"cannot load {name!r}: tried a folder of that name, then the hub model {source.where!r}{revision} "
        "in the local hub cache and online. Check the spelling, the network and, for a gated model, "
        f"`hf auth login`.{demo}{folders} transformers says: {said}"
    )


@contextmanager
def quiet() -> Generator[None]:
    """Hide the bars of transformers, but neither its warnings nor the bars of a download."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _check_folder(name: str, path: Path) -> None:
    if path.is_file():
        raise ConfigError(f"{name!r} is a file; give the folder that holds config.json and the weights.")
    if (path / "config.json").is_file():
        return
    files = sorted(entry.name for entry in path.iterdir())
    inner = checkpoints_in(path)
    if not files:
        reason = "is empty; a model folder holds config.json and the weights."
    elif "adapter_config.json" in files:
        reason = "holds an adapter only; merge it into its base model, save that, and give its folder."
    elif inner:
        shown = ", ".join(repr(f"{name.rstrip('/')}/{folder}") for folder in inner[:8])
        reason = f"holds no config.json, but {len(inner)} model folders are inside: {shown}. Give one of them."
    else:
        listed = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        reason = f"holds no config.json, so it is no model folder; it holds: {listed}."
    raise ConfigError(f"the folder {name!r} {reason}")
