from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdprobe.hf import batches, load, read_texts

STEPS = (0, 40, 80)


@pytest.fixture(scope="module")
def folders(example: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return example("train_checkpoints").train(tmp_path_factory.mktemp("checkpoints"), steps=STEPS)


@pytest.fixture(scope="module")
def tokenizer(folders: list[Path]) -> Any:
    return load(folders[0]).tokenizer


def nats_per_byte(folder: Path) -> float:
    loaded = load(folder)
    total = count = 0
    with torch.no_grad():
        for batch in batches(read_texts("demo", limit=64), loaded.tokenizer, max_length=300):
            labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
            n = int((labels[:, 1:] != -100).sum())
            total += loaded.model(**batch.inputs, labels=labels).loss.item() * n
            count += n
    return total / count


def test_training_beats_what_byte_frequencies_alone_can_say(folders: list[Path]) -> None:
    assert [folder.name for folder in folders] == ["step-0", "step-40", "step-80"]
    data = torch.tensor(list("".join(read_texts("demo", limit=64)).encode()))
    frequency = torch.bincount(data).double() / len(data)
    entropy = torch.special.entr(frequency).sum().item()
    losses = [nats_per_byte(folder) for folder in folders]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] > entropy + 1 > entropy > losses[2]
    assert 180_000 < sum(p.numel() for p in load(folders[0]).model.parameters()) < 220_000


def test_finished_checkpoints_are_kept_and_a_lost_one_comes_back_the_same(
    example: Callable[[str], ModuleType], folders: list[Path]
) -> None:
    train = example("train_checkpoints").train
    kept, lost = (folder / "model.safetensors" for folder in folders[:2])
    moved = folders[1].with_name("aside")
    folders[1].rename(moved)
    before, threads, rng = kept.stat().st_mtime_ns, torch.get_num_threads(), torch.get_rng_state()
    assert train(folders[0].parent, steps=STEPS) == folders
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == (moved / "model.safetensors").read_bytes()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), rng)
    assert not list(folders[0].parent.glob("*.part"))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<")))
def test_the_tokenizer_has_a_token_per_byte(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("&lt;3 you &amp;amp; me", "<3 you & me"),
        ("@someone  thanks\t@a_b!", "@user thanks @user!"),
        ("mail a@b.c", "mail a@b.c"),
    ],
)
def test_source_texts_are_cleaned(example: Callable[[str], ModuleType], raw: str, clean: str) -> None:
    assert example("draw_corpus")._clean(raw) == clean


def test_the_draw_is_even_over_scores_and_ignores_the_order_of_the_source(
    example: Callable[[str], ModuleType],
) -> None:
    corpus = example("draw_corpus")
    sentence = "a sentence that is quite long enough to be drawn, numbered {}"
    # Scores crowd around zero, as in the real files.
    lines = [f"{i}\t{random.Random(i).gauss(0, 1.2):.3f}\t{sentence.format(i)}" for i in range(3000)]
    lines += [
        "9001\t3.9\tToo short.",
        "9002\t-3.9\tlook at https://example.org for all of the details of this",
    ]
    drawn = corpus._draw("tweets", "\n".join(lines))
    assert drawn == corpus._draw("tweets", "\n".join(reversed(lines)))
    assert len(drawn) == corpus.PER_REGISTER
    counts = [sum(low <= row["score"] < low + 1 for row in drawn) for low in (-2, -1, 0, 1)]
    assert max(counts) - min(counts) <= 1
    assert not {"9001", "9002"} & {row["source_id"] for row in drawn}


def test_a_sentence_in_several_typographies_is_drawn_once(example: Callable[[str], ModuleType]) -> None:
    lines = [
        "1\t-3.0\tThe smell is absolutely disgusting, and I hate it.",
        "2\t-3.4\tThe smell is absolutely DISGUSTING!!! and I hate it!",
    ]
    assert len(example("draw_corpus")._draw("tweets", "\n".join(lines))) == 1
