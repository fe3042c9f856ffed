"""What `import tdprobe` adds to a program that has torch and tensordict already."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import Bar, Measured, Setup, bench
from benchmarks.peak import ROOT

# Each import in the same process as what it is added to: the noise of loading torch cancels.
CODE = """
import time
import torch, tensordict
times = [time.process_time()]
import tdprobe
times.append(time.process_time())
from tdprobe import ActivationCaching, CkaEstimator, LayerScoring, ScoreTable, compare_layers
times.append(time.process_time())
print(*times)
"""


def fresh() -> list[float]:
    """Return CPU seconds since the start of a new interpreter after each import."""
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [float(word) for word in done.stdout.split()]


@bench(
    "import",
    "import tdprobe over import torch, tensordict, in a new interpreter",
    {"import tdprobe": Bar("excess", 0.2), "and its main names": Bar("excess", 0.2)},
)
def imports(setup: Setup) -> dict[str, Measured]:
    # The first run reads the files from disk, and compiles them.
    runs = [fresh() for _ in range(setup.rounds + (not setup.tiny))][-setup.rounds :]
    bare, plain, names = zip(*runs, strict=True)
    return {"import tdprobe": Measured(plain, bare), "and its main names": Measured(names, bare)}
