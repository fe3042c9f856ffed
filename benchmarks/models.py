"""Models and inputs that several benches share."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Setup
from tdprobe import hf

BATCH, TOKENS = 16, 32


def toy_llama(layers: int) -> nn.Module:
    """Return a Llama of width 64 with random weights, in which the cost of Python shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 128}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()


@cache
def _demo() -> hf.LoadedModel:
    return hf.load("demo", dtype="float32")


def language_model(setup: Setup) -> nn.Module:
    """Return SmolLM2-135M (30 layers, width 576), or a toy."""
    return toy_llama(3) if setup.tiny else _demo().model


def random_batches(model: Any, count: int) -> list[dict[str, Tensor]]:
    """Return batches of random token ids, without padding."""
    generator = torch.Generator().manual_seed(0)
    size = (BATCH, TOKENS)
    vocabulary = model.config.vocab_size
    return [{"input_ids": torch.randint(vocabulary, size, generator=generator)} for _ in range(count)]


def text_batches(model: Any, setup: Setup, count: int) -> list[dict[str, Tensor]]:
    """Return batches of the shipped corpus, padded; with a toy, random ids under a ragged mask."""
    if setup.tiny:
        lengths = TOKENS - torch.arange(BATCH).unsqueeze(1)
        mask = (torch.arange(TOKENS) < lengths).long()
        return [{**batch, "attention_mask": mask} for batch in random_batches(model, count)]
    texts = [text for text in hf.read_texts("demo") if len(text) < 100]
    found = hf.batches(texts, _demo().tokenizer, batch_size=BATCH, max_length=TOKENS)
    return [dict(batch.inputs) for batch in islice(found, count)]


def smollm2_texts(count: int) -> list[dict[str, Tensor]]:
    """Return batches of the shipped corpus, whole texts, padded."""
    found = hf.batches(hf.read_texts("demo"), _demo().tokenizer, batch_size=BATCH, max_length=4 * TOKENS)
    return [dict(batch.inputs) for batch in islice(found, count)]


@torch.no_grad()
def layer_rows(setup: Setup, count: int) -> list[Tensor]:
    """Return what every layer gives for the first tokens of the shipped corpus, ``(count, d)``; of a toy, any ids."""
    model: Any = language_model(setup)
    parts, found = [], 0
    for batch in random_batches(model, 1) if setup.tiny else smollm2_texts(count // BATCH):
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        parts.append([x[real] for x in model(**batch, output_hidden_states=True, use_cache=False).hidden_states[1:]])
        found += int(real.sum())
        if found >= count:
            break
    return [torch.cat(x)[:count] for x in zip(*parts, strict=True)]
