"""Peak memory of one call, measured in a process of its own."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def peak_mb(module: str, function: str, *sizes: int) -> float:
    """Return by how many MB (10^6 bytes) a call raises resident memory above what the imports left.

    Args:
        module: Imported in the new process, such as ``"benchmarks.bench_cka"``.
        function: Its function to call.
        sizes: What to call it with.
    """
    command = [sys.executable, "-m", "benchmarks.peak", module, function, *map(str, sizes)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def _status(field: str) -> float:
    """Read a size in MB from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(f"/proc/self/status has no {field}")


def _now_and_peak() -> tuple[float, float]:
    # On Linux, ru_maxrss starts from the peak of the process that started this one; VmHWM does not.
    if Path("/proc/self/status").exists():
        return _status("VmRSS"), _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return peak, peak


def _main() -> None:
    module, function, *sizes = sys.argv[1:]
    call = getattr(importlib.import_module(module), function)
    before, _ = _now_and_peak()
    call(*map(int, sizes))
    print(_now_and_peak()[1] - before)


if __name__ == "__main__":
    _main()
