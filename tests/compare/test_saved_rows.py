"""Rows of checkpoints in files: compared later, they give what the checkpoints would have given together."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdprobe import hf
from tdprobe.compare import LayerComparison, SavedRows, compare_layers
from tdprobe.errors import ConfigError, StateError
from tdprobe.latent import CkaEstimator
from tdprobe.stats import Reservoir
from tiny_checkpoints import byte_llama, byte_tokenizer

TEXTS = [f"{'abcdefgh'[i % 8] * (i % 5)}{i} is a number of {i * i + 3} letters" for i in range(24)]
ESTIMATORS = ["cka", CkaEstimator(), "information_imbalance", "twonn"]


def loaded(change: float = 0.0, **options: Any) -> hf.LoadedModel:
    return hf.LoadedModel(byte_llama(change=change, **options), byte_tokenizer(), "byte", None)


def run(models: Any, batches: Any = TEXTS, layers: Any = None, **options: Any) -> LayerComparison:
    comparison = LayerComparison(models, layers, ESTIMATORS, **{"progress": False, "batch_size": 5, **options})
    comparison.run(batches)
    return comparison


def saved(path: Path, models: Any = None, *args: Any, **options: Any) -> Path:
    run({"base": loaded()} if models is None else models, *args, one_at_a_time=True, **options).saved_rows().save(path)
    return path


# The same numbers.


@pytest.mark.parametrize("kind", ["path", "str", "object"])
@pytest.mark.parametrize("bank_size", [4096, 200])
def test_the_second_checkpoint_meets_the_first_one_when_that_is_gone(kind: str, bank_size: int, tmp_path: Path) -> None:
    wanted = run({"base": loaded(), "tuned": loaded(0.05)}, one_at_a_time=True, bank_size=bank_size).scores()
    path = saved(tmp_path / "base.rows", bank_size=bank_size)
    gc.collect()
    source = {"path": path, "str": str(path), "object": SavedRows.load(path)}[kind]
    found = run({"base": source, "tuned": loaded(0.05)}, bank_size=bank_size)
    assert found.one_at_a_time
    table = found.scores()
    assert table.blocks == wanted.blocks and table.layers("base") == wanted.layers("base")
    assert {block.n for block in table.blocks} == {200 if bank_size == 200 else sum(len(t) - 1 for t in TEXTS)}
    about, other = (found.meta["checkpoints"] for found in (table, wanted))
    assert about["base"]["fingerprint"] == other["base"]["fingerprint"] and about == other


def test_two_files_meet_without_any_model(tmp_path: Path) -> None:
    wanted = run({"base": loaded(), "tuned": loaded(0.05)}, one_at_a_time=True).scores()
    paths = {"base": saved(tmp_path / "a"), "tuned": saved(tmp_path / "b", {"x": loaded(0.05)})}
    comparison = LayerComparison(paths, None, ESTIMATORS)
    assert comparison.scores().blocks == wanted.blocks
    # Over the same texts there is nothing left to run.
    assert compare_layers(paths, TEXTS, None, ESTIMATORS, batch_size=5, progress=False).blocks == wanted.blocks


def test_a_smaller_sample_says_how_many_rows_meet(tmp_path: Path) -> None:
    path = saved(tmp_path / "few", bank_size=100)
    table = run({"base": path, "tuned": loaded(0.05)}, bank_size=300).scores()
    assert {block.n for block in table.blocks} == {100} and table.meta["rows_left_out"] == 200
    wanted = run({"base": loaded(), "tuned": loaded(0.05)}, one_at_a_time=True, bank_size=100).scores()
    assert table.blocks == wanted.blocks


def test_layers_are_picked_of_what_was_saved(tmp_path: Path) -> None:
    path = saved(tmp_path / "base")
    models, pattern = {"base": path, "tuned": loaded(0.05)}, r"model\.layers\.[02]$"
    table = run(models, layers={"base": pattern, "tuned": r"model\.layers\.1$"}).scores()
    whole = run({"base": loaded(), "tuned": loaded(0.05)}, one_at_a_time=True).scores()
    assert table.layers("base") == ("model.layers.0", "model.layers.2") and table.layers("tuned") == ("model.layers.1",)
    wanted = whole.matrix("cka", "base", "tuned")[[0, 2], 1:2]
    np.testing.assert_allclose(table.matrix("cka", "base", "tuned"), wanted, atol=1e-5)
    with pytest.raises(ConfigError, match=r"'model\.layer\.9' matches no layer of the saved rows of 'base'.*layers"):
        LayerComparison({"base": path}, "model.layer.9")


def test_other_tokenizers_meet_text_by_text(tmp_path: Path, minilm: tuple[nn.Module, Any]) -> None:
    texts = TEXTS[:12]
    path = saved(tmp_path / "base", None, texts, tokens="mean")
    other = hf.LoadedModel(*minilm, "minilm", None)
    table = run({"base": path, "minilm": other}, texts, tokens="mean").scores()
    assert table.matrix("cka", "base", "minilm").shape == (3, 6) and table.block("cka", "base", "minilm").n == 12
    by_token = saved(tmp_path / "tokens", None, texts)
    with pytest.raises(ConfigError, match="give rows of different tokens.*tokens='last' or tokens='mean'"):
        run({"base": by_token, "minilm": other}, texts).scores()


def pictures(shift: float = 0.0) -> list[Tensor]:
    return list((torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + shift).split(8))


def mlp(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))


def test_tensors_of_several_runs(tmp_path: Path) -> None:
    def twice(models: Any) -> LayerComparison:
        comparison = run(models, pictures(), r"\d", one_at_a_time=True)
        comparison.run(pictures(1.0))
        return comparison

    twice({"a": mlp(0)}).saved_rows().save(tmp_path / "a")
    table = twice({"a": tmp_path / "a", "b": mlp(1)}).scores()
    assert table.blocks == twice({"a": mlp(0), "b": mlp(1)}).scores().blocks and table.block("cka", "a", "b").n == 80


def test_rows_come_back_bit_by_bit(tmp_path: Path) -> None:
    half = {"half": hf.LoadedModel(byte_llama().bfloat16(), byte_tokenizer(), "byte", None)}
    rows = run(half, one_at_a_time=True, bank_size=50).saved_rows()
    rows.save(tmp_path / "half")
    again = SavedRows.load(tmp_path / "half")
    assert {x.dtype for x in again.state.rows.values()} == {torch.bfloat16} and len(again.state.ids) == 50
    assert bool((again.state == rows.state).all()) and (again.name, again.layers) == ("half", rows.layers)
    assert (again.about, again.selection, list(again.data)) == (rows.about, rows.selection, list(rows.data))


# What does not go together.


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens": "last"}, r"'base' were saved with tokens='all', this comparison with tokens='last'"),
        ({"skip_first": 2}, "with skip_first=1, this comparison with skip_first=2"),
        ({"batch_size": 6}, "with batch_size=5, this run with batch_size=6; rows meet only where"),
        ({"max_length": 20}, "with max_length=128, this run with max_length=20"),
        ({"batches": TEXTS[:20]}, "with texts=24, this run with texts=20"),
        ({"batches": [*TEXTS[:-1], "another"]}, "saved from other data than this run; compare over the same texts"),
        ({"batches": TEXTS[::-1]}, "saved from other data than this run"),
        ({"batches": [byte_tokenizer()(TEXTS[:1], return_tensors="pt")]}, "with texts=24, this run with texts=None"),
        ({"one_at_a_time": False}, "'base' is a sample of rows.*leave one_at_a_time=False out"),
    ],
)
def test_other_data_or_tokens_are_named_before_anything_runs(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "base")
    other = loaded(0.05)
    other.model.register_forward_pre_hook(lambda *_: pytest.fail("nothing may run"))
    with pytest.raises(ConfigError, match=problem):
        run({"base": path, "tuned": other}, **change)


def test_files_of_other_data_do_not_meet(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "a"), saved(tmp_path / "b", None, TEXTS[:20])
    with pytest.raises(ConfigError, match=r"'b' were saved with run 1\.texts=20, those of 'a' with run 1\.texts=24"):
        LayerComparison({"a": one, "b": two})
    with pytest.raises(ConfigError, match="'a' were saved with texts=None, this run with texts=24"):
        comparison = LayerComparison({"a": one, "c": loaded()}, batch_size=5, progress=False)
        comparison.run(TEXTS)
        comparison.run(TEXTS)


def test_files_that_are_no_rows_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "base")
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:-9])
    (tmp_path / "text").write_text("a text", encoding="utf-8")
    x, ids = torch.randn(3, 2), torch.arange(3)
    Reservoir().update(Reservoir().init([x], ids), [x], ids).save(tmp_path / "state")
    problems = {
        "flipped": "is damaged: its checksum does not fit",
        "short": "cannot be read",
        "text": "cannot be read .* not a file of rows that .* --save-rows wrote .a model is given by its folder",
        "state": r"holds 'tdprobe\.state', not 'tdprobe\.rows'",
    }
    for name, problem in problems.items():
        with pytest.raises(ConfigError, match=f"{name}' {problem}"):
            LayerComparison({"a": tmp_path / name})


def test_what_was_not_sampled_cannot_be_saved() -> None:
    together = run({"a": mlp(0), "b": mlp(1)}, pictures(), r"\d", one_at_a_time=False)
    with pytest.raises(StateError, match="no rows of 'a' were sampled: run the comparison with one_at_a_time=True"):
        together.saved_rows("a")
    for name in (None, "c"):
        with pytest.raises(ConfigError, match=rf"name one of the checkpoints that were run \('a', 'b'\); got {name!r}"):
            together.saved_rows(name)
