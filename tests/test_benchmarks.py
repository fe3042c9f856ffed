"""The harness of `make bench`: what it makes of times, and that every bench runs. Nothing is timed here."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import tdprobe
import tdprobe.latent

ROOT = Path(__file__).parents[1]
# A bench is one file, which says its name by its own.
NAMES = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Import from benchmarks/, which is no part of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            patch.setenv(variable, "1")
        yield importlib.import_module


@pytest.fixture
def harness(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.harness")


@pytest.fixture
def stub(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a bench whose figures are known: 3 s against 2 s, then 30 s against 20 s."""
    bars = {"reached": harness.Bar("ratio", 1.5), "missed": harness.Bar("excess", 2.0)}
    measured = harness.Measured([3.0, 30.0], [2.0, 20.0])
    bench = harness.Bench("stub", "known", bars, lambda setup: {"missed": measured, "reached": measured})
    monkeypatch.setitem(harness.BENCHES, "stub", bench)


def test_contenders_take_turns_and_the_warm_up_does_not_count(harness, monkeypatch):
    now, calls, costs = [0.0], [], {"a": 2.0, "b": 0.5}

    def contender(name: str) -> Callable[[], None]:
        def call() -> None:
            now[0] += costs[name] if len(calls) >= 2 else 1000.0
            calls.append(name)

        return call

    monkeypatch.setattr(harness.time, "process_time", lambda: now[0])
    times = harness.interleave({name: contender(name) for name in costs}, 3, loops=2, unit="ms")
    assert "".join(calls) == "ab" + "aabb" + "bbaa" + "aabb"
    assert times == {"a": [2000.0] * 3, "b": [500.0] * 3}


@pytest.mark.parametrize(
    ("kind", "limit", "figure", "ok"),
    [
        ("ratio", 2.0, 2.0, True),
        ("ratio", 1.9, 2.0, False),
        ("gain", 0.5, 0.5, True),
        ("gain", 0.6, 0.5, False),
        ("excess", 5.0, 5.0, True),
        ("excess", 4.9, 5.0, False),
        ("value", 9.0, 9.0, True),
        ("value", 8.9, 9.0, False),
        ("ratio", None, 2.0, None),
    ],
)
def test_figures_are_taken_round_by_round(harness, kind, limit, figure, ok):
    # Medians of each side are 9 and 3: their ratio is 3, the median of the three ratios is 2.
    measured = harness.Measured([10.0, 9.0, 2.0], [5.0, 1.0, 3.0])
    bench = harness.Bench("x", "x", {"row": harness.Bar(kind, limit)}, lambda setup: {"row": measured})
    (result,) = harness.run(bench, harness.Setup())
    assert (result.figure, result.ok, result.ours, result.reference) == (figure, ok, 9.0, 3.0)
    assert (result.ratio, result.rounds) == (3.0, 3)
    assert result.low <= result.figure <= result.high


def test_nan_is_no_success(harness):
    assert harness.Bar("ratio", 1.5).holds(math.nan) is False
    assert harness.Bar("gain", 1.5).holds(math.nan) is False


def test_command_line_prints_writes_and_judges(stub, load, tmp_path, capsys):
    main, file = load("benchmarks.__main__").main, tmp_path / "bench.json"
    assert main(["stub", "--json", str(file)]) == 0
    assert main(["stub", "--strict"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("MISSED") == 2
    assert "1 of 2 bars reached" in printed
    written = json.loads(file.read_text(encoding="utf-8"))
    assert [(row["label"], row["figure"], row["ok"]) for row in written["results"]] == [
        ("reached", 1.5, True),
        ("missed", 5.5, False),
    ]


def test_unknown_bench_is_refused_with_a_close_name(stub, load, capsys):
    with pytest.raises(SystemExit):
        load("benchmarks.__main__").main(["stubb"])
    assert "'stub'" in capsys.readouterr().err


def test_list_names_every_bench(load, capsys):
    assert load("benchmarks.__main__").main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_bench_runs_on_toys(name, harness, load, monkeypatch):
    # The peer need not be there: our own classes have its names.
    monkeypatch.setitem(sys.modules, "tdhook", tdprobe)
    monkeypatch.setitem(sys.modules, "tdhook.latent", tdprobe.latent)
    load(f"benchmarks.bench_{name}")
    bench = harness.BENCHES[name]
    results = harness.run(bench, harness.Setup(rounds=1, tiny=True))
    assert [result.label for result in results] == list(bench.bars)
    for result in results:
        if (name, result.label) == ("disentanglement", "largest difference in value") and result.note:
            # Its values can only be compared with those of the peer itself.
            assert result.note == "latte-metrics not installed"
            continue
        assert math.isfinite(result.figure)
        assert result.ratio > 0
        assert result.ok is None
    json.dumps([result.as_json() for result in results], allow_nan=False)


def test_rows_of_a_peer_that_is_not_installed_say_so(harness, load, monkeypatch):
    monkeypatch.setitem(sys.modules, "tdhook", None)
    monkeypatch.delitem(sys.modules, "tdhook.latent", raising=False)
    bench = (load("benchmarks.bench_tdhook"), harness.BENCHES["tdhook"])[1]
    results = harness.run(bench, harness.Setup(rounds=1))
    assert [(result.label, result.note, result.ok) for result in results] == [
        (label, "peer not installed", None) for label in bench.bars
    ]
    printed = harness.table(results)
    assert printed.count("peer not installed") == len(bench.bars)
    assert "0 of 0 bars reached" in printed
    json.dumps([result.as_json() for result in results], allow_nan=False)


def test_peak_memory_counts_the_call_and_not_this_process(load):
    peak_mb = load("benchmarks.peak").peak_mb
    assert peak_mb("random", "randbytes", 1) < 20
    assert 100 <= peak_mb("random", "randbytes", 100_000_000) < 320
