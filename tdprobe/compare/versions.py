"""What a run was made with."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tdprobe import __version__


def run_facts() -> dict[str, Any]:
    """Return the date and the versions that a result depends on, JSON-able."""
    found = {"python": platform.python_version(), "tdprobe": __version__}
    for package in ("torch", "tensordict", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": found}
