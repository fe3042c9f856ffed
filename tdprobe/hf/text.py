"""Read texts from files and hand them to a model in batches."""

from __future__ import annotations

import copy
import importlib.resources
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.hf.lines import check_file, text_of, texts_in


@dataclass(frozen=True)
class TextBatch:
    """Hold one batch of tokenized texts.

    Attributes:
        inputs: What the model's forward takes, as ``input_ids`` and ``attention_mask``, each (b, t) int64.
        ids: (b,) int64, the index of each text in the list: the same for every model and every order.
        texts: The texts themselves.
    """

    inputs: dict[str, Tensor]
    ids: Tensor
    texts: list[str]


def demo_corpus() -> list[dict[str, Any]]:
    """Return the shipped 800 human-rated sentences, with ``text``, ``score``, ``register`` and ``source_id``.

    Example:
        >>> sorted({row["register"] for row in demo_corpus()})
        ['amazon_reviews', 'movie_reviews', 'nyt_editorials', 'tweets']
    """
    file = importlib.resources.files("tdprobe") / "data" / "vader_sample.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def read_texts(path: str | Path, *, field: str | None = None, limit: int | None = None) -> list[str]:
    """Read one text per sample.

    Args:
        path: A ``.txt`` file with a text per non-empty line, a ``.jsonl`` or ``.ndjson`` file with an object
            per line, or ``"demo"`` for the shipped corpus (a file of that name is ``"./demo"``).
        field: Which field of the objects is the text; ``"text"`` by default.
        limit: Read no more than this many texts.

    Raises:
        ConfigError: The file is missing, empty, not UTF-8 or not what its suffix says; the line is named.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"got limit={limit}; it must be at least 1, or None for all texts.")
    if path == "demo":
        rows = enumerate(demo_corpus(), 1)
        found = (text_of(f"line {number} of 'demo'", row, field or "text") for number, row in rows)
    else:
        found = texts_in(check_file(Path(path).expanduser(), field), field)
    texts = list(islice(found, limit))
    if not texts:
        raise ConfigError(f"{str(path)!r} holds no text; it is empty or has blank lines only.")
    return texts


class TextBatches:
    """Tokenized batches that can be walked more than once, such as once per model.

    Attributes:
        batch_size: Texts per batch.
        n_truncated: How many texts were cut at ``max_length``.
        max_length: The cap in tokens that was applied.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Any,
        batch_size: int,
        max_length: int,
        device: Any,
        sort_by_length: bool,
    ) -> None:
        _check_arguments(texts, tokenizer, batch_size, max_length)
        self._texts, self.batch_size, self._device = list(texts), batch_size, device
        # A tokenizer keeps and saves the padding and truncation of its last call; the user's must not.
        self._tokenizer = copy.deepcopy(tokenizer)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = _padding(self._tokenizer)
        self.max_length = min(max_length, tokenizer.model_max_length)
        whole = self._tokenizer(self._texts, padding=False, truncation=False, verbose=False)
        lengths = [len(ids) for ids in whole["input_ids"]]
        if 0 in lengths:
            index = lengths.index(0)
            raise ConfigError(f"text {index} is {self._texts[index]!r}, which has no tokens; drop it.")
        self.n_truncated = sum(length > self.max_length for length in lengths)
        self._order = list(range(len(lengths)))
        if sort_by_length:
            self._order.sort(key=lengths.__getitem__)

    def __len__(self) -> int:
        return -(-len(self._order) // self.batch_size)

    def __iter__(self) -> Iterator[TextBatch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> TextBatch:
        """Return one batch; the others are not tokenized for it."""
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} batches, got the number {number}")
        ids = self._order[number * self.batch_size : (number + 1) * self.batch_size]
        texts = [self._texts[i] for i in ids]
        encoding = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        inputs = {name: tensor.to(self._device) for name, tensor in encoding.items()}
        return TextBatch(inputs, torch.tensor(ids, device="cpu"), texts)

    @property
    def texts(self) -> list[str]:
        """The texts, in the order in which they were given."""
        return list(self._texts)


def batches(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int = 128,
    device: str | torch.device | None = None,
    sort_by_length: bool = False,
) -> TextBatches:
    """Tokenize texts into padded batches; the tokenizer itself stays as it is.

    Padding goes to the tokenizer's own side. Where it has no padding token, its end-of-text token fills in.

    Args:
        texts: The texts; a text's index is its sample id.
        tokenizer: A transformers tokenizer.
        batch_size: Texts per batch.
        max_length: Cap in tokens per text, at most the tokenizer's own; a warning counts the texts cut.
        device: Where the tensors go; the CPU by default.
        sort_by_length: Batch texts of similar length together, which saves padding; the ids tell them apart.

    Returns:
        An iterable of :class:`TextBatch` with a length, which starts afresh each time it is walked.

    Raises:
        ConfigError: There is no tokenizer or no text, a text has no tokens, or a number is below 1.
    """
    found = TextBatches(texts, tokenizer, batch_size, max_length, device, sort_by_length)
    if found.n_truncated:
        warnings.warn(
            f"{found.n_truncated} of {len(texts)} texts are longer than {found.max_length} tokens and were "
            "cut; raise max_length to keep them whole.",
            stacklevel=2,
        )
    return found


def _check_arguments(texts: Sequence[str], tokenizer: Any, batch_size: int, max_length: int) -> None:
    if tokenizer is None:
        raise ConfigError(
            "the model has no tokenizer, so it cannot read text; put tokenizer.json into its folder, "
            "or call the model with input_ids of your own."
        )
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"texts must be a list of strings; got {type(texts).__name__}.")
    if not texts:
        raise ConfigError("got no texts to tokenize; give at least one.")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ConfigError(f"got {name}={value}; it must be at least 1.")


def _padding(tokenizer: Any) -> str:
    # The attention mask hides these positions, so any token of the vocabulary serves.
    return tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
