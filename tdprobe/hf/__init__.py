"""The one door to transformers: models, tokenizers and texts."""

from __future__ import annotations

from tdprobe.hf.demo import demo_encoder_path, demo_model_path
from tdprobe.hf.models import LoadedModel, describe, load, weights_bytes
from tdprobe.hf.text import TextBatch, TextBatches, batches, demo_corpus, read_texts

__all__ = [
    "LoadedModel",
    "TextBatch",
    "TextBatches",
    "batches",
    "demo_corpus",
    "demo_encoder_path",
    "demo_model_path",
    "describe",
    "load",
    "read_texts",
    "weights_bytes",
]
