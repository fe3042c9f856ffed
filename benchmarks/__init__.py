"""Running times as ratios against floors and references: ``python -m benchmarks [name ...]``.

Every ``bench_*.py`` holds one bench; a new file is found by its name.
"""

from __future__ import annotations

import os

# Read when torch loads, in this process and in those that benches start: one thread everywhere.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"
