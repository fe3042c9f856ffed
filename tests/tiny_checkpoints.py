"""Small checkpoint folders with a tokenizer, for tests that load models by name."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


@cache
def training_example() -> Any:
    """Return ``examples/train_checkpoints.py`` as a module."""
    path = ROOT / "examples" / "train_checkpoints.py"
    spec = importlib.util.spec_from_file_location("train_checkpoints", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte."""
    return training_example().byte_tokenizer()


def byte_llama(seed: int = 0, change: float = 0.0, layers: int = 3) -> nn.Module:
    """Return a Llama of width 16 on bytes; ``change`` moves its weights by noise of that size."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += change * torch.randn_like(parameter)
    return model


def save_checkpoint(folder: Path, **options: Any) -> Path:
    """Save :func:`byte_llama` and its tokenizer to a folder; return the folder."""
    byte_llama(**options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
