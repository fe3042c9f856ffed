"""Load a model and its tokenizer by name, and say what they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdprobe.errors import ConfigError, unknown
from tdprobe.hf import hub
from tdprobe.hf.demo import converted_path, demo_encoder_path, demo_model_path

DEMO, DEMO_ENCODER = hub.DEMOS
_VALUES_PER_PARAMETER = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class LoadedModel:
    """Hold a checkpoint that is ready to run.

    Attributes:
        model: The model, in eval mode.
        tokenizer: Its tokenizer, or None where the checkpoint has none.
        name: The name it was asked by.
        revision: Commit of a hub model; None for folders.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None


def load(
    name: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> LoadedModel:
    """Load a checkpoint by name, with its language-model head if it has one.

    Code from a model's repository is never run. ``requires_grad`` stays as transformers sets it.

    Args:
        name: ``"demo"`` (SmolLM2-135M), ``"demo-encoder"`` (MiniLM-L6), a folder, ``"owner/model"`` or
            ``"owner/model@revision"``. A folder called ``demo`` is ``"./demo"``.
        dtype: Dtype of the weights, ``"float32"`` or ``torch.float32``; the checkpoint's own by default.
        device: Where the model goes; the CPU by default.

    Raises:
        ConfigError: The name, the dtype or the device means nothing, or the checkpoint cannot be read.
    """
    name = str(name)
    dtype = _dtype(dtype)
    device = torch.device("cpu") if device is None else _device(device)
    source = _find(name)
    try:
        model, tokenizer = _read(source, dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(hub.explain(name, source, error)) from error
    return LoadedModel(_moved(model.eval(), device), tokenizer, name, hub.commit(source))


def weights_bytes(name: str | Path) -> int | None:
    """Return the bytes of a checkpoint's weight files, or None where only a download would tell.

    Raises:
        ConfigError: The name means nothing, as in :func:`load`.
    """
    if name == DEMO:
        return hub.weights_in(converted_path())
    source = _find(str(name))
    return hub.weights_in(Path(source.where)) if source.is_local else hub.cached_weights(source)


def describe(model: nn.Module, tokenizer: Any = None, *, revision: str | None = None) -> dict[str, Any]:
    """Return what identifies a model in a report, as JSON-able values.

    The fingerprint hashes the name, shape, dtype and 64 evenly spaced values of every parameter: cheap, equal
    for equal weights on any device, different after a training step. An edit of a few weights may escape it.

    Example:
        >>> describe(nn.Linear(2, 3))["n_parameters"]
        9
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or None
    about = {
        "class": type(model).__name__,
        # The folder a model was loaded from is the user's own business.
        "config_name": Path(name).name if name and Path(name).is_absolute() else name,
        "model_type": getattr(config, "model_type", None),
        # transformers forgets the commit it read; only the one who loaded the model knows it.
        "revision": revision,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "dtype": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "fingerprint": _fingerprint(model),
    }
    if tokenizer is not None:
        about["tokenizer"] = {"class": type(tokenizer).__name__, "vocab_size": len(tokenizer)}
    return about


def _find(name: str) -> hub.Source:
    if name == DEMO:
        return hub.Source(str(demo_model_path()), is_local=True)
    if name == DEMO_ENCODER:
        return hub.Source(str(demo_encoder_path()), is_local=True)
    if name.rpartition("@")[0] in (DEMO, DEMO_ENCODER) and not Path(name).exists():
        raise ConfigError(f"got {name!r}, but demo models have no revisions; write {name.split('@')[0]!r}.")
    return hub.find(name)


def _read(source: hub.Source, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    options: dict[str, Any] = {"trust_remote_code": False}
    if source.revision is not None:
        options["revision"] = source.revision
    with hub.quiet():
        config = AutoConfig.from_pretrained(source.where, **options)
        causal = any(name in CAUSAL.values() for name in config.architectures or ())
        auto = AutoModelForCausalLM if causal else AutoModel
        model = auto.from_pretrained(source.where, dtype=dtype or "auto", **options)
        return model, _tokenizer(source, options)


def _tokenizer(source: hub.Source, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if source.is_local and not any((Path(source.where) / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.where, **options)
    except (OSError, ValueError):
        if source.is_local:
            raise
        return None


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(unknown("dtype", dtype, ["float32", "bfloat16", "float16", "float64"]))
    return found


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"got the device {device!r}; write 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:
        # Memory that runs out says so itself.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"got the device {str(device)!r}, which this machine or this build of PyTorch does not have ({said}); "
            "leave it out for the CPU."
        ) from error


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            count = min(flat.numel(), _VALUES_PER_PARAMETER)
            at = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
            digest.update(flat[at].cpu().double().numpy().tobytes())
    return digest.hexdigest()
