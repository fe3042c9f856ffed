"""Commands over several processes that torchrun starts, and over checkpoints that are gone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdprobe.__main__ import main
from tdprobe.compare import SavedRows, compare_layers
from tdprobe.tables import ScoreTable
from tiny_checkpoints import ROOT, save_checkpoint

LINES = [f"line {i} has {i * i} {'ab' * (i % 7)} letters" for i in range(30)]
# 8 batches in 4 units.
UNITS = ("--batch-size", "4", "--unit", "2", "--estimators", "cka,twonn")
RESULTS = {"scores.json", "report.html", "cka-base.png", "cka-base-tuned.png", "cka-tuned.png"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    save_checkpoint(root / "base")
    save_checkpoint(root / "tuned", change=0.05)
    (root / "texts.txt").write_text("\n".join(LINES), encoding="utf-8")
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tdprobe", "compare", *map(str, args), "--quiet"])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    return call


def torchrun(*command: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [*start, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def blocks(folder: Path) -> tuple[Any, ...]:
    return ScoreTable.from_json(folder / "scores.json").blocks


# Several processes.


def test_torchrun_gives_what_one_process_gives(run: Run, root: Path, tmp_path: Path) -> None:
    command = (root / "base", "--data", root / "texts.txt", *UNITS)
    assert run(*command, "--out", tmp_path / "one")[0] == 0
    result = torchrun("-m", "tdprobe", "compare", *command, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert blocks(tmp_path / "two") == blocks(tmp_path / "one")
    one, two = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two == {"scores.json", "report.html", "cka-base.png", "twonn-base.png"}
    # One of them prints, and shows its own half.
    assert result.stdout.count("ScoreTable:") == 1 and result.stdout.count("report.html") == 1
    assert "4/4" in result.stderr and "8/8" not in result.stderr and "error" not in result.stderr


# torchrun tells the others to end when one has died, whatever they are at by then.
TOLD = {"when it comes": "", "at an error": "Sharing, 'kept'", "at the end": "dist, 'destroy_process_group'"}


@pytest.mark.parametrize("when", TOLD)
def test_a_process_that_dies_takes_the_others_along_but_not_their_work(
    run: Run, root: Path, tmp_path: Path, when: str
) -> None:
    told = f"told_in({TOLD[when]})\n" if TOLD[when] else ""
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, signal\n"
        "import torch.distributed as dist\n"
        "from tdprobe.__main__ import main\n"
        "from tdprobe.compare.parts import PartFolder\n"
        "from tdprobe.compare.sharing import Sharing\n"
        "write = PartFolder.write\n"
        "def killed(self, unit, part):\n"
        "    write(self, unit, part)\n"
        "    if unit == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "PartFolder.write = killed\n"
        "def told_in(owner, name):\n"
        "    function = getattr(owner, name)\n"
        "    def told(*args):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return function(*args)\n"
        "    setattr(owner, name, told)\n"
        f"{told}"
        "main()\n",
        encoding="utf-8",
    )
    command = ("compare", root / "base", "--data", root / "texts.txt", *UNITS, "--out", tmp_path / "out", "--quiet")
    result = torchrun(dying, *command)
    assert result.returncode != 0 and "ScoreTable" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert re.match(r"error \(rank 0\): (rank 1 has ended|this process was told to end)", line)
    assert "race condition" not in result.stderr
    assert f"finished units are in '{tmp_path / 'out' / 'parts'}': the same run goes on from there" in line
    kept = {path.name for path in (tmp_path / "out" / "parts").glob("*.safetensors")}
    assert "part-000001.safetensors" in kept
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"parts"}
    # One process finishes what two began, and says so where it is asked for something else.
    code, _, err = run(*command[1:], "--skip-first", 2)
    assert code == 2 and "holds parts of another run, with skip_first=1; this one has skip_first=2" in err
    assert run(*command[1:])[0] == 0
    assert run(*command[1:], "--out", tmp_path / "whole")[0] == 0
    assert blocks(tmp_path / "out") == blocks(tmp_path / "whole")
    assert not (tmp_path / "out" / "parts").exists()


def test_half_of_what_torchrun_sets_is_not_enough(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = run(root / "base", "--data", root / "texts.txt", "--out", root / "out")
    assert code == 2 and re.match(r"error \(rank \?\): WORLD_SIZE is set and RANK, .* not; start with torchrun", err)


# Checkpoints that are gone.


def test_rows_of_a_checkpoint_are_saved_and_compared_later(run: Run, root: Path, tmp_path: Path) -> None:
    data, rows = ("--data", root / "texts.txt"), tmp_path / "deep" / "base.rows"
    code, out, _ = run(root / "base", *data, "--save-rows", rows, "--out", tmp_path / "first")
    assert code == 0 and "base × base" in out
    assert SavedRows.load(rows).name == "base"
    assert run(rows, root / "tuned", *data, "--out", tmp_path / "second")[0] == 0
    wanted = compare_layers({n: root / n for n in ("base", "tuned")}, LINES, one_at_a_time=True, progress=False)
    assert blocks(tmp_path / "second") == wanted.blocks
    assert {path.name for path in (tmp_path / "second").iterdir()} == RESULTS
    # Two files need neither models nor texts.
    more = tmp_path / "tuned.rows"
    assert run(root / "tuned", *data, "--save-rows", more, "--out", tmp_path / "third")[0] == 0
    assert run(rows, more, "--out", tmp_path / "fourth")[0] == 0
    assert blocks(tmp_path / "fourth") == wanted.blocks


BAD: dict[str, tuple[list[str], str]] = {
    "two models": (["{base}", "{tuned}", "--save-rows", "{out}/a"], "--save-rows saves the rows of one model, got .*,"),
    "together": (["{base}", "--save-rows", "{out}/a", "--no-one-at-a-time"], "--save-rows needs a sample"),
    "folder": (["{base}", "--save-rows", "{root}"], "cannot save rows to .*it is a folder"),
    "below a file": (["{base}", "--save-rows", "{root}/texts.txt/a"], "texts.txt' is a file"),
    "no data": (["{base}"], "--data is missing"),
    "no rows": (["{root}/texts.txt", "{base}"], "texts.txt' cannot be read .* not a file of rows"),
    "unit": (["{base}", "--unit", "0"], "unit is a number of batches"),
    "timeout": (["{base}", "--timeout", "0"], "timeout counts seconds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_nothing_written(run: Run, root: Path, tmp_path: Path, case: str) -> None:
    args, problem = BAD[case]
    out = tmp_path / "out"
    given = [arg.format(root=root, base=root / "base", tuned=root / "tuned", out=out) for arg in args]
    data = [] if case == "no data" else ["--data", root / "texts.txt"]
    code, printed, err = run(*given, *data, "--out", out)
    assert code == 2 and printed == "" and not out.exists()
    assert re.fullmatch(f"error: .*{problem}.*\n", err), err
