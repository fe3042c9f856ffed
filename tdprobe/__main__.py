"""Start the command line: ``tdprobe`` or ``python -m tdprobe``."""

from __future__ import annotations

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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_warning(message: Any, *where: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
