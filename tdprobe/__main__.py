"""Start the command line: ``tdprobe`` or ``python -m tdprobe``."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from tdprobe.errors import TdprobeError


def main() -> None:
    """Run the command line; what a user can mend is shown as one line, not as a traceback."""
    warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]
    try:
        from tdprobe.cli import app

        app()
    except TdprobeError as error:
        print(f"error{_rank()}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _rank() -> str:
    """Name the process where there are several."""
    return f" (rank {os.environ.get('RANK', '?')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _show_warning(message: Any, *where: Any, **more: Any) -> None:
    # Several processes would all say the same.
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
