"""Names that are imported when they are first used."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdprobe.errors import unknown


def lazy(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build the ``__getattr__``, ``__dir__`` and ``__all__`` of a package (PEP 562) from the stub beside it.

    Type checkers and editors read the same stub, ``__init__.pyi``: a name is written down once, as
    ``from package.module import Name as Name``; submodules as ``from package import module as module``.

    Args:
        package: Its ``__name__``.
        file: Its ``__file__``.
    """
    stub = ast.parse(Path(file).with_name("__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    where = {alias.name: node.module or package for node in imports for alias in node.names}
    names = sorted(name for name, module in where.items() if module != package)

    def __getattr__(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r}: {unknown('name', name, list(where))}")
        if where[name] == package:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return __getattr__, __dir__, names
