"""Measure contenders in turns and judge the figures against bars."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

Kind = Literal["ratio", "gain", "excess", "value"]
SECONDS = {"s": 1.0, "ms": 1e3, "us": 1e6}


@dataclass(frozen=True)
class Bar:
    """What a figure must keep to.

    Attributes:
        kind: ``"ratio"``: ours / reference is at most the limit; ``"gain"``: reference / ours is at least the
            limit; ``"excess"``: ours - reference is at most the limit; ``"value"``: ours itself is.
        limit: In the unit of the measurement for ``"excess"`` and ``"value"``; ``None``: shown, not judged.
    """

    kind: Kind
    limit: float | None = None

    def figure(self, ours: float, reference: float) -> float:
        """Return the number that the limit is about."""
        if self.kind in ("ratio", "gain"):
            return ours / reference if self.kind == "ratio" else reference / ours
        return ours - reference if self.kind == "excess" else ours

    def holds(self, figure: float) -> bool | None:
        """Judge a figure; ``None`` without a limit. NaN never holds."""
        if self.limit is None:
            return None
        return figure >= self.limit if self.kind == "gain" else figure <= self.limit

    def written(self, figure: float, unit: str) -> str:
        """Write a figure as a reader expects it."""
        return {
            "ratio": f"{figure:.3f}x",
            "gain": f"{figure:.1f}x less",
            "excess": f"{figure:+.3g} {unit}",
            "value": f"{figure:.4g} {unit}",
        }[self.kind]

    def __str__(self) -> str:
        if self.limit is None:
            return "-"
        written = {"ratio": f"{self.limit:g}x", "gain": f"{self.limit:g}x", "excess": f"{self.limit:+g}"}
        return f"{'>=' if self.kind == 'gain' else '<='} {written.get(self.kind, f'{self.limit:g}')}"


@dataclass(frozen=True)
class Measured:
    """Ours and the reference, one number per round, round by round in the same moments.

    Attributes:
        ours: In ``unit``.
        reference: In ``unit``; for a ``"value"``, the number that it may be read against.
        unit: ``"s"``, ``"ms"``, ``"us"`` of CPU time, or ``"MB"``.
    """

    ours: Sequence[float]
    reference: Sequence[float]
    unit: str = "s"


@dataclass(frozen=True)
class Setup:
    """How a bench is to run.

    Attributes:
        rounds: Turns of every contender, after one to warm up.
        tiny: A toy in place of the real thing: shows that the bench runs, measures nothing.
    """

    rounds: int = 7
    tiny: bool = False


Run = Callable[[Setup], Mapping[str, "Measured | str"]]


@dataclass(frozen=True)
class Bench:
    """One registered bench.

    Attributes:
        name: What the command line calls it.
        what: What is measured, in one line.
        bars: One for each row that ``run`` returns.
        run: Measures, and returns the rows by their label; in place of one, why it could not be measured.
    """

    name: str
    what: str
    bars: Mapping[str, Bar]
    run: Run


@dataclass(frozen=True)
class Result:
    """One judged row; medians over rounds, and the smallest and largest figure of a round.

    A row that could not be measured has no figures, and a note that says why.
    """

    name: str
    what: str
    label: str
    kind: Kind
    bar: float | None
    unit: str = ""
    ours: float | None = None
    reference: float | None = None
    ratio: float | None = None
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    ok: bool | None = None
    rounds: int = 0
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


BENCHES: dict[str, Bench] = {}


def bench(name: str, what: str, bars: Mapping[str, Bar]) -> Callable[[Run], Run]:
    """Register the function below as a bench."""

    def register(run: Run) -> Run:
        BENCHES[name] = Bench(name, what, bars, run)
        return run

    return register


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, loops: int = 1, unit: str = "s"
) -> dict[str, list[float]]:
    """Time contenders in turns, A B, B A, A B, ..., so that a busy machine slows all of them alike.

    Args:
        contenders: What to call, by name.
        rounds: Turns of each, after one to warm up.
        loops: Calls per turn.
        unit: Of the result.

    Returns:
        CPU time of one call, for each turn.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    # Searching all that is loaded for garbage would hit one contender or the other by chance.
    gc.collect()
    gc.freeze()
    try:
        for turn in range(rounds):
            for name in list(contenders)[:: -1 if turn % 2 else 1]:
                times[name].append(cpu_time(contenders[name], loops) * SECONDS[unit])
    finally:
        gc.unfreeze()
    return times


def cpu_time(call: Callable[[], object], loops: int = 1) -> float:
    """Return the CPU seconds of one call."""
    start = time.process_time()
    for _ in range(loops):
        call()
    return (time.process_time() - start) / loops


def judge(bench: Bench, label: str, measured: Measured | str) -> Result:
    """Put the figure of one row against its bar: the median of the figures of single rounds."""
    bar = bench.bars[label]
    if isinstance(measured, str):
        return Result(bench.name, bench.what, label, bar.kind, bar.limit, note=measured)
    figures = [bar.figure(a, b) for a, b in zip(measured.ours, measured.reference, strict=True)]
    ours, reference = median(measured.ours), median(measured.reference)
    figure = median(figures)
    return Result(
        name=bench.name,
        what=bench.what,
        label=label,
        unit=measured.unit,
        ours=ours,
        reference=reference,
        ratio=ours / reference,
        kind=bar.kind,
        figure=figure,
        low=min(figures),
        high=max(figures),
        bar=bar.limit,
        ok=bar.holds(figure),
        rounds=len(figures),
    )


def run(bench: Bench, setup: Setup) -> list[Result]:
    """Run one bench and judge its rows, in the order of its bars; toys are not judged."""
    rows = bench.run(setup)
    results = [judge(bench, label, rows[label]) for label in bench.bars]
    return [replace(result, ok=None) for result in results] if setup.tiny else results


def table(results: Sequence[Result]) -> str:
    """Write results as a table, a heading for each bench."""
    head = f"{'':40}{'ours':>12}{'reference':>12}  {'figure (lowest to highest round)':38}{'bar':>9}"
    lines, last = [head], None
    for row in results:
        if row.name != last:
            lines += ["", f"{row.name}: {row.what}"]
            last = row.name
        lines.append(_line(row))
    judged = [row.ok for row in results if row.ok is not None]
    return "\n".join([*lines, "", f"{sum(judged)} of {len(judged)} bars reached"])


def _line(row: Result) -> str:
    if row.note:
        return f"  {row.label:38}{row.note}"
    bar = Bar(row.kind, row.bar)
    figure, low, high = (bar.written(value, row.unit) for value in (row.figure, row.low, row.high))
    verdict = {True: "ok", False: "MISSED", None: ""}[row.ok]
    values = "".join(f"{f'{value:.4g} {row.unit}':>12}" for value in (row.ours, row.reference))
    spread = f"{figure} ({low} to {high})" if row.rounds > 1 else figure
    return f"  {row.label:38}{values}  {spread:38}{bar!s:>9}  {verdict}".rstrip()
