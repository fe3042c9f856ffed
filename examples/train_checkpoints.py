"""Train a small language model from scratch and keep a checkpoint at every stage.

A byte-level Llama of about 200,000 parameters learns the shipped corpus in 400 steps, half a minute on one
CPU core. Each checkpoint is an ordinary model folder of 0.8 MB, with its tokenizer: it loads by its path.

    python examples/train_checkpoints.py checkpoints
    tdprobe compare checkpoints/step-0 checkpoints/step-400 --data demo --layers "model.layers.\\d+$"
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tdprobe.hf import read_texts
from tdprobe.hf.hub import quiet

STEPS = (0, 25, 50, 100, 200, 400)
BATCH, LENGTH, LEARNING_RATE = 16, 96, 4e-3


def train(folder: str | Path = "checkpoints", steps: Sequence[int] = STEPS, seed: int = 0) -> list[Path]:
    """Train, save a checkpoint after each of ``steps``, and return their folders; finished ones are kept."""
    paths = [Path(folder) / f"step-{step}" for step in sorted(steps)]
    if all(path.exists() for path in paths):
        return paths
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        threads = torch.get_num_threads()
        # Matrices this small are slower on two threads than on one.
        torch.set_num_threads(1)
        try:
            _train(byte_llama(tokenizer), tokenizer, dict(zip(sorted(steps), paths, strict=True)))
        finally:
            torch.set_num_threads(threads)
    return paths


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the 256 bytes and two marks."""
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def byte_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained Llama of four layers and width 64."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, paths: dict[int, Path]) -> None:
    text = torch.tensor(tokenizer(tokenizer.eos_token.join(read_texts("demo")))["input_ids"])
    last = max(paths)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_fall)
    for step in tqdm(range(last + 1), desc="training", unit="step"):
        if step in paths:
            _save(model, tokenizer, paths[step])
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
        batch = text[starts + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        if step % 25 == 0:
            tqdm.write(f"step {step:4d}   loss {loss.item():.3f} nats per byte")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _warm_up_and_fall(step: int) -> float:
    return min((step + 1) / 20, max(1 - step / max(STEPS), 0.05))


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    if path.exists():
        return
    # Renamed when complete, so that a folder that exists is a finished one.
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet():
        model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    os.replace(part, path)


if __name__ == "__main__":
    for path in train(*sys.argv[1:2]):
        print(path)
