"""A checkpoint folder as a user would have it, and the example scripts as modules."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    return _example


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llama: nn.Module) -> Path:
    """Return a folder with the tiny Llama and a byte-level tokenizer; tests do not write to it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama.save_pretrained(folder)
    _example("train_checkpoints").byte_tokenizer().save_pretrained(folder)
    return folder
