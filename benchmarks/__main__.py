"""The command line: ``python -m benchmarks [name ...]``."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import benchmarks
from benchmarks.harness import BENCHES, Setup, run, table
from tdprobe.errors import unknown

VERSIONS = ("torch", "tensordict", "transformers", "numpy")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    for module in pkgutil.iter_modules(benchmarks.__path__, "benchmarks."):
        if module.name.startswith("benchmarks.bench_"):
            importlib.import_module(module.name)
    if options.list:
        print("\n".join(f"{bench.name:12} {bench.what}" for bench in BENCHES.values()))
        return 0
    if options.rounds < 1:
        _parser().error(f"--rounds counts turns, at least 1; got {options.rounds}")
    for name in options.names:
        if name not in BENCHES:
            _parser().error(unknown("bench", name, BENCHES))
    setup, results = Setup(options.rounds, options.tiny), []
    for name in options.names or BENCHES:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        results += run(BENCHES[name], setup)
    print(table(results))
    if options.json:
        about = {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
        facts = {"threads": torch.get_num_threads(), "tiny": options.tiny, "versions": about}
        document = {**facts, "results": [result.as_json() for result in results]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return int(options.strict and any(result.ok is False for result in results))


def _parser() -> argparse.ArgumentParser:
    about = "CPU time on one thread, as ratios."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about)
    parser.add_argument("names", nargs="*", metavar="name", help="benches to run; all by default")
    parser.add_argument("--rounds", type=int, default=Setup.rounds, help="turns of each (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--tiny", action="store_true", help="toys instead of the real things, not judged")
    parser.add_argument("--list", action="store_true", help="list the benches")
    return parser


if __name__ == "__main__":
    sys.exit(main())
