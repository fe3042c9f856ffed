"""Run an example as a script, and hand back what it computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Runs an example and prints, as the last line, some of its variables and the curves of its figures.
RUN = """
import json, runpy, sys
import matplotlib.pyplot as plt
import numpy as np
folder, name, *wanted = sys.argv[1:]
sys.path.insert(0, folder)
found = runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
figures = [plt.figure(number) for number in plt.get_fignums()]
curves = {line.get_label(): line.get_ydata() for figure in figures for ax in figure.axes for line in ax.lines}
plain = lambda value: value.to_json() if hasattr(value, "to_json") else np.asarray(value).tolist()
print(json.dumps({"curves": curves, "figures": len(figures)} | {key: found[key] for key in wanted}, default=plain))
"""


def run(name: str, *wanted: str) -> dict[str, Any]:
    """Return what an example computed, with its ``curves``, the number of ``figures`` and what it ``printed``."""
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, str(ROOT / "examples"), name, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *printed, last = done.stdout.splitlines()
    return json.loads(last) | {"printed": "\n".join(printed)}
