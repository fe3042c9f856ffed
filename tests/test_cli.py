"""The command line as users meet it: what it prints, what it writes, how it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import nn

from tdprobe import hf, registry
from tdprobe.__main__ import main
from tdprobe.compare import compare_layers
from tdprobe.hooks import match_modules
from tdprobe.tables import ScoreTable
from tiny_checkpoints import ROOT, save_checkpoint

LINES = [f"line {i} has {i * i} {'ab' * (i % 7)} letters" for i in range(30)]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*args: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["tdprobe", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        return Result(int(end.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two checkpoints, one with a tokenizer of words, and files of texts, good and bad."""
    root = tmp_path_factory.mktemp("cli")
    save_checkpoint(root / "base")
    save_checkpoint(root / "tuned", change=0.05)
    save_checkpoint(root / "other" / "base", seed=1)
    _word_checkpoint(root / "words")
    (root / "texts.txt").write_text("\n".join(LINES), encoding="utf-8")
    (root / "texts.jsonl").write_text('{"body": "one two"}\n{"body": "three"}\n', encoding="utf-8")
    (root / "few.txt").write_text("one line\nand two\n", encoding="utf-8")
    (root / "empty.txt").write_text("\n \n", encoding="utf-8")
    (root / "latin.txt").write_bytes("naïve café\n".encode("latin-1"))
    return root


def _word_checkpoint(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save_checkpoint(folder)
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *sorted({w for line in LINES for w in line.split()})])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for file in folder.glob("token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


# What goes well.


def test_two_checkpoints_are_compared_and_everything_is_written(run: Run, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = run(
        "compare", root / "base", root / "tuned", "--data", root / "texts.txt", "--out", out, "--tokens", "all"
    )
    assert result.code == 0 and "error" not in result.err
    assert "2/2" in result.err and "batch" in result.err
    assert sorted(path.name for path in out.iterdir()) == [
        "cka-base-tuned.png",
        "cka-base.png",
        "cka-tuned.png",
        "report.html",
        "scores.json",
    ]
    table = ScoreTable.from_json(out / "scores.json")
    wanted = compare_layers({n: root / n for n in ("base", "tuned")}, LINES, None, tokens="all", progress=False)
    assert table.blocks == wanted.blocks
    assert table.block("cka", "base", "tuned").n == sum(len(line) - 1 for line in LINES) - table.meta["outliers"]
    assert table.meta["data"] == "texts.txt" and table.meta["texts"] == 30 and "interrupted" not in table.meta
    assert str(root) not in (out / "scores.json").read_text(encoding="utf-8")
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "<html" in report and "model.layers.1" in report and "tuned" in report
    for picture in out.glob("*.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
    assert repr(table) in result.out and str(out / "report.html") in result.out


def test_options_reach_the_comparison(run: Run, root: Path, tmp_path: Path) -> None:
    options = {
        "--layers": r"model\.layers\.[02]$",
        "--tokens": "1:3",
        "--skip-first": 2,
        "--max-norm": 0,
        "--rescale": "standard",
        "--limit": 20,
        "--batch-size": 6,
        "--max-length": 50,
        "--dtype": "float64",
    }
    flat = [str(part) for pair in options.items() for part in pair]
    result = run("compare", root / "base", "--data", root / "texts.txt", "--out", tmp_path, "--quiet", *flat)
    # The token after "line" and the number is the same in every line, so no layer varies.
    assert result.code == 0 and "cka: NaN for 'base" in result.err
    table = ScoreTable.from_json(tmp_path / "scores.json")
    assert table.layers() == ("model.layers.0", "model.layers.2") and table.blocks[0].n == 20
    assert (
        table.meta["max_norm"] is None
        and table.meta["rescale"] == "standard"
        and table.meta["checkpoints"]["base"]["dtype"] == ["float64"]
    )
    wanted = compare_layers(
        {"base": root / "base"},
        LINES[:20],
        options["--layers"],
        tokens="1:3",
        skip_first=2,
        max_norm=None,
        rescale="standard",
        batch_size=6,
        dtype="float64",
        progress=False,
    )
    assert table.blocks == wanted.blocks


def test_one_at_a_time_gives_the_same(run: Run, root: Path, tmp_path: Path) -> None:
    for name, flag in (("together", "--no-one-at-a-time"), ("turns", "--one-at-a-time")):
        args = ("compare", root / "base", root / "tuned", "--data", root / "texts.txt", "--out", tmp_path / name, flag)
        args += ("--tokens", "last")
        assert run(*args).code == 0
    together, turns = (ScoreTable.from_json(tmp_path / name / "scores.json") for name in ("together", "turns"))
    for one, two in zip(together.blocks, turns.blocks, strict=True):
        np.testing.assert_allclose(one.values, two.values, atol=1e-5)


def test_models_of_one_name_keep_their_paths(run: Run, root: Path, tmp_path: Path) -> None:
    twins = [str(root / "base"), str(root / "other" / "base")]
    assert run("compare", *twins, "--data", root / "texts.txt", "--out", tmp_path, "--quiet").code == 0
    assert ScoreTable.from_json(tmp_path / "scores.json").checkpoints == tuple(twins)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_names_that_draw_to_one_file_get_one_each() -> None:
    from tdprobe.cli import _picture_name

    taken: list[str] = []
    for key in (("cka", "a/b", "a/b"), ("cka", "a_b", "a_b"), ("cka", "a", "b-c"), ("cka", "a-b", "c")):
        taken.append(_picture_name(key, taken))
    assert taken == ["cka-a_b.png", "cka-a_b-2.png", "cka-a-b-c.png", "cka-a-b-c-2.png"]
    assert len(_picture_name(("cka", "x" * 400, "y" * 400), [])) < 200


def test_a_table_with_many_pairs_draws_some_and_says_so(run: Run, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tdprobe.cli.MAX_PICTURES", 1)
    args = ("compare", root / "base", root / "tuned", "--data", root / "texts.txt", "--out", tmp_path, "--quiet")
    result = run(*args)
    assert "drew the first 1 of 3 pictures" in result.err and len(list(tmp_path.glob("*.png"))) == 1


def test_the_embedded_model_and_corpus_have_a_name(run: Run, tmp_path: Path) -> None:
    options = ("--limit", 6, "--max-length", 16, "--layers", r"model\.layers\.[0-2]$", "--tokens", "all")
    result = run("compare", "demo", "--data", "demo", "--out", tmp_path, *options)
    assert result.code == 0
    warned = [line for line in result.err.splitlines() if "warning" in line.lower()]
    assert warned == [line for line in warned if re.match(r"warning: \d of 6 texts are longer than 16 tokens", line)]
    table = ScoreTable.from_json(tmp_path / "scores.json")
    assert table.layers() == tuple(f"model.layers.{i}" for i in range(3)) and table.meta["data"] == "demo"
    assert table.meta["checkpoints"]["demo"]["n_parameters"] == 134_515_008


# Listing layers.


def test_listed_patterns_can_be_pasted(run: Run, root: Path) -> None:
    result = run("layers", root / "base")
    assert result.code == 0 and result.err == ""
    head, *rows = result.out.splitlines()
    assert head.split()[:3] == ["pattern", "module", "count"]
    model, found = hf.load(root / "base").model, []
    for row in rows:
        pattern, kind, count, shape = re.fullmatch(r"(\S+) +(\S+) +(\d+)  (.+)", row).groups()
        matched = match_modules(model, pattern)
        assert len(matched) == int(count) and {type(m).__name__ for m in matched.values()} == {kind}
        found.append((pattern, shape))
    assert (r"model\.layers\.\d+$", "(b, t, 16)") in found
    every = run("layers", root / "base", "--all").out.splitlines()[1:]
    assert len(every) == len(match_modules(model, "")) > len(rows)


def _save(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(folder)
    return folder


def test_an_encoder_with_a_decoder_is_run_with_both_inputs(run: Run, tmp_path: Path) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    result = run("layers", _save(tmp_path / "t5", T5Model(config)))
    assert result.code == 0 and "no shapes" not in result.err
    for side in ("encoder", "decoder"):
        assert re.search(rf"^{side}\\\.block\\\.\\d\+\$ +T5Block +2  \(b, t, 16\)$", result.out, re.MULTILINE)


def test_a_model_of_pictures_is_listed_without_shapes(run: Run, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    result = run("layers", _save(tmp_path / "vit", ViTModel(config)))
    assert result.code == 0
    (note,) = [line for line in result.err.splitlines() if "no shapes" in line]
    assert note.startswith("no shapes: ViTModel, whose main input is 'pixel_values', did not run on token ids")
    assert re.search(r"2  did not run$", result.out, re.MULTILINE)


# What goes wrong: one line, exit code 2, nothing written.

BAD: dict[str, tuple[list[str], str]] = {
    "pattern": (["{base}", "--layers", "model.layer.9"], r"'model.layer.9' matches no module.*'model.layers.0'"),
    "regex": (["{base}", "--layers", "["], r"'\[' is no regular expression"),
    "estimator": (["{base}", "--estimators", "ckaa"], "unknown estimator 'ckaa'; did you mean 'cka'"),
    "second estimator": (["{base}", "--estimators", "cka,tw"], "unknown estimator 'tw'"),
    "no estimator": (["{base}", "--estimators", ","], "estimators is empty"),
    "tokens": (["{base}", "--tokens", "lats"], "unknown token selection 'lats'; did you mean 'last'"),
    "skip": (["{base}", "--skip-first", "-1"], "skip_first counts tokens.*got -1"),
    "norm": (["{base}", "--max-norm", "0.5"], "max_norm.*got 0.5"),
    "rescale": (["{base}", "--rescale", "units"], "unknown rescale 'units'; did you mean 'unit'"),
    "limit": (["{base}", "--limit", "0"], "got limit=0"),
    "batch size": (["{base}", "--batch-size", "0"], "got batch_size=0"),
    "dtype": (["{base}", "--dtype", "float33"], "unknown dtype 'float33'"),
    "device": (["{base}", "--device", "gpu"], "got the device 'gpu'"),
    "absent device": (["{base}", "--device", "cuda:99"], "got the device 'cuda:99', which this machine or this build"),
    "labels": (["{base}", "--estimators", "cka,mig"], "'mig' reads 'attributes' .* in Python, LayerScoring"),
    "no such token": (["{base}", "--tokens", "500"], "no row has been scored yet.*tokens='500' and skip_first=1 leave"),
    "too few rows": (["{base}", "--data", "{root}/few.txt", "--tokens", "last"], "got 2 rows.*at least 4"),
    "row counts": (["{base}", "{root}/words", "--tokens", "all"], r"rows 'base': \d+, 'words': \d+.*tokens='last'"),
    "row counts in turns": (
        ["{base}", "{root}/words", "--tokens", "all", "--one-at-a-time"],
        r"rows 'base': \d+, 'words': \d+.*tokens='last'",
    ),
    "empty data": (["{base}", "--data", "{root}/empty.txt"], "empty.txt' holds no text"),
    "not UTF-8": (["{base}", "--data", "{root}/latin.txt"], "latin.txt' is not UTF-8 text: byte 2"),
    "no data": (["{base}", "--data", "{root}/text.txt"], "no file .*did you mean .*texts.txt"),
    "field": (["{base}", "--data", "{root}/texts.jsonl", "--field", "bodi"], "no field 'bodi'; did you mean 'body'"),
    "no model": (["{root}/bass"], "no folder .*bass'; did you mean .*base'"),
    "no model beside one": (["{base}", "{root}/bass", "--no-one-at-a-time"], "no folder .*bass'"),
    "twice": (["{base}", "{base}"], "a model is given twice"),
    "out below a file": (["{base}", "--out", "{root}/texts.txt/out"], r"cannot write.*out'.*texts.txt' is a file"),
    "out is a file": (["{base}", "--out", "{root}/texts.txt"], "cannot write .*texts.txt' is a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_nothing_written(
    run: Run, root: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args, problem = BAD[case]
    given = [arg.format(root=root, base=root / "base") for arg in args]
    if "--data" not in args:
        given += ["--data", str(root / "texts.txt")]
    if "--out" not in args:
        given += ["--out", str(tmp_path / "a" / "out")]
    before = sorted(root.rglob("*"))
    result = run("compare", *given, "--quiet")
    assert result.code == 2 and result.out == ""
    assert re.fullmatch(f"error: .*{problem}.*\n", result.err), result.err
    assert not list(tmp_path.iterdir()) and sorted(root.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_found_out_first(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A container's root can write anywhere, so the answer of the system is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    monkeypatch.setattr(hf, "load", _never)
    result = run("compare", root / "base", "--data", root / "texts.txt", "--out", tmp_path / "new" / "out")
    assert result.code == 2
    assert re.fullmatch(rf"error: .*new/out'.*'{re.escape(str(tmp_path))}' is not writable; .*\n", result.err)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be loaded")


@pytest.mark.parametrize(
    ("module", "extra"),
    [("matplotlib", "plot"), ("altair", "report"), ("vl_convert", "report"), ("jinja2", "report")],
)
def test_a_missing_extra_is_noticed_before_models_run(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(hf, "load", _never)
    result = run("compare", root / "base", "--data", root / "texts.txt", "--out", tmp_path / "out")
    assert result.code == 2 and not list(tmp_path.iterdir())
    assert result.err == (
        f"error: '{module}' is not installed; it comes with the extra '{extra}': pip install 'tdprobe[{extra}]'\n"
    )


def test_without_typer_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "tdprobe.cli", raising=False)
    result = run("layers", "demo")
    assert result.code == 2 and result.err.startswith("error: 'typer' is not installed; it comes with the extra 'cli'")


def test_wrong_usage_is_answered_by_usage(run: Run) -> None:
    result = run("compare")
    assert result.code == 2 and "Usage" in result.err and "models" in result.err
    assert run("compare", "--help").code == 0
    assert "compare" in run("--help").out


# Interrupts.


@pytest.mark.parametrize("place", ["tdprobe.hf.read_texts", "tdprobe.hf.load"])
def test_an_interrupt_before_the_first_batch_writes_nothing(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    result = run("compare", root / "base", "--data", root / "texts.txt", "--out", tmp_path / "out")
    assert result.code == 130 and "Traceback" not in result.err and not list(tmp_path.iterdir())


def test_an_interrupt_in_a_later_checkpoint_leaves_the_finished_ones(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = hf.load, []

    def second(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return load(*args, **kwargs)

    monkeypatch.setattr(hf, "load", second)
    models = (root / "base", root / "tuned")
    result = run(
        "compare",
        *models,
        "--data",
        root / "texts.txt",
        "--out",
        tmp_path,
        "--one-at-a-time",
        "--quiet",
        "--tokens",
        "last",
    )
    assert result.code == 130 and result.err == "interrupted; writing what 30 rows give\n"
    table = ScoreTable.from_json(tmp_path / "scores.json")
    assert table.checkpoints == ("base",) and table.meta["interrupted"] is True


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent as POSIX systems do")
def test_ctrl_c_writes_what_was_finished(root: Path, tmp_path: Path) -> None:
    lines = 8_000
    (tmp_path / "many.txt").write_text("\n".join(f"line {i}" for i in range(lines)), encoding="utf-8")
    # A shell may start its children with SIGINT ignored.
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tdprobe.__main__ import main; main()"
    )
    args = ["compare", root / "base", "--data", tmp_path / "many.txt", "--out", tmp_path / "out", "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        seen = b""
        while not re.search(rb"\D[1-9]\d{2,}/8000", seen):
            part = os.read(process.stderr.fileno(), 4096)
            assert part, f"ended by itself: {seen.decode()}"
            seen += part
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err and b"interrupted; writing what" in err and b"ScoreTable" in out
    table = ScoreTable.from_json(tmp_path / "out" / "scores.json")
    assert table.meta["interrupted"] is True and 100 <= table.meta["rows"] < lines
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scores.json", "report.html", "cka-base.png"}


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "tdprobe", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "compare" in result.stdout and "layers" in result.stdout


def test_no_temporary_files_are_left(run: Run, root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    shutil.copy(root / "texts.txt", data)
    for _ in range(2):
        assert run("compare", root / "base", "--data", data, "--out", tmp_path / "out", "--quiet").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cka-base.png", "report.html", "scores.json"]


def test_estimators_are_listed_with_what_they_mean(run: Run) -> None:
    result = run("estimators")
    lines = {line.split()[0]: line for line in result.out.splitlines()}
    assert result.code == 0 and set(lines) == set(registry.names())
    assert "more similar" in lines["cka"] and "Kornblith" in lines["cka"]


def test_null_scores_and_a_mode_reach_the_table(run: Run, root: Path, tmp_path: Path) -> None:
    more = ("--layers", r"model\.layers\.\d+$", "--quiet", "--null", 4, "--mode", "strict")
    result = run("compare", root / "base", "--data", root / "texts.txt", "--out", tmp_path, *more)
    assert result.code == 0, result.err
    table = ScoreTable.from_json(tmp_path / "scores.json")
    assert table.meta["permutations"] == 4 and table.meta["mode"] == "strict"
    assert table.blocks[0].p is not None and table.blocks[0].null is not None
    result = run("compare", root / "base", "--data", root / "texts.txt", "--out", tmp_path, "--mode", "robst")
    assert result.code == 2 and "unknown mode 'robst'; did you mean 'robust'" in result.err
