from __future__ import annotations

import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdprobe.errors import ConfigError
from tdprobe.hf import batches, demo_corpus, load, read_texts

TEXTS = [
    "short",
    "a text of middling length",
    "x",
    "and one that is a good deal longer than the rest of them",
]
_NON_BLANK = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@pytest.fixture
def tokenizer(checkpoint: Path) -> Any:
    return load(checkpoint).tokenizer


@given(
    texts=st.lists(_NON_BLANK, min_size=1),
    escape=st.booleans(),
    suffix=st.sampled_from([".jsonl", ".ndjson"]),
)
def test_json_lines_give_back_every_text(texts: list[str], escape: bool, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"data{suffix}"
        lines = [json.dumps({"n": 1, "say": text}, ensure_ascii=escape) for text in texts]
        file.write_text("\n\n".join(lines), encoding="utf-8", newline="")
        # A NUL character inside a JSON string is escaped, so it is no sign of a binary file.
        assert read_texts(file, field="say") == texts


@given(texts=st.lists(_NON_BLANK.filter(lambda t: not set(t) & set("\n\0\ufeff")).map(str.strip), min_size=1))
def test_text_lines_give_back_every_text(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.txt"
        for newline, mark in (("\n", ""), ("\r\n", "\ufeff")):
            file.write_bytes((mark + newline.join(["", *texts, "  ", ""])).encode())
            assert read_texts(file) == texts


def test_a_limit_stops_reading_early(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_bytes(b"one\ntwo\n\xff\n")
    assert read_texts(file, limit=2) == ["one", "two"]
    with pytest.raises(ConfigError, match="got limit=0"):
        read_texts(file, limit=0)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text; it is empty"),
        ("a.txt", b"\n  \n", "holds no text; it is empty"),
        ("a.jsonl", b"", "holds no text; it is empty"),
        (
            "a.txt",
            "fine\ncaf\u00e9".encode("latin-1"),
            "byte 8 (line 2) cannot be read. If it is WINDOWS-1252, convert it: iconv",
        ),
        (
            "a.txt",
            "hello".encode("utf-16"),
            "byte 0 (line 1) cannot be read. If it is UTF-16, convert it: iconv -f UTF-16",
        ),
        ("a.txt", "hello".encode("utf-16-le"), "byte 1 (line 1) cannot be read. If it is UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 of"),
        ("a.jsonl", b'{"text": \n', "is not JSON (Expecting value at column"),
        ("a.jsonl", b'["a"]', "is a JSON list; an object with 'text' is needed"),
        (
            "a.jsonl",
            b'{"texts": "a", "id": 3}',
            "has no field 'text'; did you mean 'texts'? Its fields: texts, id.",
        ),
        (
            "a.jsonl",
            b'{"body": "a"}',
            "has no field 'text'; say which one is the text with field= (--field). Its fields: body.",
        ),
        ("a.jsonl", b"{}", "Its fields: none."),
        ("a.jsonl", b'{"text": "a"}\n{"text": 4}', "holds 4 in field 'text'"),
        ("a.jsonl", b'{"text": " "}', "holds ' ' in field 'text'"),
        ("a.csv", b"text\na", "its suffix must be .txt, .jsonl or .ndjson"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_texts(tmp_path / name)


def test_a_wrong_path_is_explained(tmp_path: Path) -> None:
    (tmp_path / "reviews.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"no file .*reviws\.txt'; did you mean '.*reviews\.txt'"):
        read_texts(tmp_path / "reviws.txt")
    with pytest.raises(ConfigError, match=r"no file .*; check the path"):
        read_texts(tmp_path / "none" / "a.txt")
    with pytest.raises(ConfigError, match=r"is a folder; it holds 'reviews\.txt'; give one file"):
        read_texts(tmp_path)
    with pytest.raises(ConfigError, match=r"got field='body' .* a \.txt file has no fields"):
        read_texts(tmp_path / "reviews.txt", field="body")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sort_by_length", [False, True])
def test_batches_hold_the_tokens_of_each_text(tokenizer: Any, side: str, sort_by_length: bool) -> None:
    tokenizer.padding_side = side
    seen = {}
    for batch in batches(TEXTS, tokenizer, batch_size=3, sort_by_length=sort_by_length):
        for i, ids, mask, text in zip(batch.ids.tolist(), *batch.inputs.values(), batch.texts, strict=True):
            seen[i] = ids[mask.bool()].tolist()
            pads = ids[~mask.bool()]
            assert (pads == tokenizer.pad_token_id).all()
            assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
            assert text == TEXTS[i]
    assert seen == {i: tokenizer(text)["input_ids"] for i, text in enumerate(TEXTS)}


def test_sorting_saves_padding(tokenizer: Any) -> None:
    plain = batches(TEXTS, tokenizer, batch_size=2)
    ordered = batches(TEXTS, tokenizer, batch_size=2, sort_by_length=True)
    assert [batch.ids.tolist() for batch in ordered] == [[2, 0], [1, 3]]
    sizes = [[batch.inputs["input_ids"].numel() for batch in b] for b in (plain, ordered)]
    assert sum(sizes[1]) == 2 * (len(TEXTS[0]) + len(TEXTS[3])) < sum(sizes[0]) == 2 * (len(TEXTS[1]) + len(TEXTS[3]))


def test_batches_can_be_walked_again(tokenizer: Any) -> None:
    found = batches(TEXTS, tokenizer, batch_size=3)
    assert len(found) == 2 == len(list(found))
    for first, again in zip(found, found, strict=True):
        assert torch.equal(first.inputs["input_ids"], again.inputs["input_ids"])


def test_a_long_text_is_cut_aloud(tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match=r"2 of 4 texts are longer than 20 tokens and were cut; raise max_length"):
        found = batches(TEXTS, tokenizer, max_length=20)
    assert (found.n_truncated, found.max_length) == (2, 20)
    (batch,) = found
    assert batch.inputs["attention_mask"].sum(1).tolist() == [min(len(text), 20) for text in TEXTS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert batches(TEXTS, tokenizer, max_length=max(map(len, TEXTS))).n_truncated == 0


def test_the_tokenizers_own_cap_and_end_mark_hold(minilm: tuple[Any, Any]) -> None:
    _, tokenizer = minilm
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        found = batches(["word " * 9000], tokenizer, max_length=8000)
    ids = next(iter(found)).inputs["input_ids"][0].tolist()
    assert len(ids) == found.max_length == tokenizer.model_max_length
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_the_tokenizer_is_left_as_it_was(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "before")
    (batch,) = batches(TEXTS, tokenizer, max_length=60)
    assert (batch.inputs["input_ids"][~batch.inputs["attention_mask"].bool()] == tokenizer.eos_token_id).all()
    tokenizer.save_pretrained(tmp_path / "after")
    assert tokenizer.pad_token is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


@pytest.mark.parametrize("marks", [{"eos_token": None}, {"eos_token": None, "unk_token": "<eos>"}])
def test_padding_needs_no_mark_of_its_own(tokenizer: Any, marks: dict[str, Any]) -> None:
    tokenizer.pad_token = None
    for name, value in marks.items():
        setattr(tokenizer, name, value)
    (batch,) = batches(TEXTS, tokenizer)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [len(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ([], {}, "got no texts to tokenize"),
        ("one string", {}, "texts must be a list of strings; got str"),
        (["a", ""], {}, "text 1 is '', which has no tokens"),
        (["a"], {"batch_size": 0}, "got batch_size=0"),
        (["a"], {"max_length": 0}, "got max_length=0"),
    ],
)
def test_wrong_arguments_are_explained(tokenizer: Any, texts: Any, options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        batches(texts, tokenizer, **options)


def test_the_corpus_is_what_its_description_says() -> None:
    rows = demo_corpus()
    registers = ["tweets", "amazon_reviews", "movie_reviews", "nyt_editorials"]
    assert len(rows) == 800 == len({(row["register"], row["source_id"]) for row in rows})
    assert [row["register"] for row in rows] == registers * 200
    assert len({row["text"].lower() for row in rows}) == 800
    for row in rows:
        assert 40 <= len(row["text"]) <= 220
        assert not re.search(r"&(amp|lt|gt|quot|#\d+);|https?:|\S@\S", row["text"])
        assert set(re.findall(r"(?<!\w)@\w+", row["text"])) <= {"@user"}
    for register in registers:
        scores = [row["score"] for row in rows if row["register"] == register]
        assert all(sum(low <= score < low + 1 for score in scores) >= 25 for low in (-3, -2, -1, 0, 1, 2))
        # A prefix is a fair sample too: balanced in registers, and spread over the scores.
        assert min(scores[:20]) < -2 < 2 < max(scores[:20])
    assert read_texts("demo", limit=5) == [row["text"] for row in rows[:5]]
    assert read_texts("demo", field="register", limit=4) == registers
    with pytest.raises(ConfigError, match="line 1 of 'demo' has no field 'label'"):
        read_texts("demo", field="label")


def test_the_corpus_ships_with_its_licence() -> None:
    import importlib.resources

    licence = (importlib.resources.files("tdprobe") / "data" / "LICENSE-vader.txt").read_text()
    assert "MIT" in licence and "C.J. Hutto" in licence
