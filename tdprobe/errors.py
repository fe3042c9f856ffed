"""Errors that say what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class TdprobeError(Exception):
    """Base class of every error that tdprobe raises on purpose."""


class ConfigError(TdprobeError, ValueError):
    """Report a bad argument, pattern, path or input."""


class StateError(TdprobeError, RuntimeError):
    """Report a call at the wrong time, such as entering a context twice."""


class MissingKeyError(TdprobeError, KeyError):
    """Report a key that an input lacks."""

    # KeyError prints the repr of its argument, which would escape every quote of the message.
    __str__ = Exception.__str__


class RankError(TdprobeError, RuntimeError):
    """Report that another process of the same run has ended or gone silent."""


class CallError(TdprobeError, TypeError):
    """Report a call that lacks an argument, or an argument of the wrong type."""


class MissingExtraError(TdprobeError, ImportError):
    """Report an optional package that is not installed."""


def closest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` names that resemble ``name``, best first."""
    names = list(dict.fromkeys(names))
    lowered = {n.lower(): n for n in names}
    hits = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)
    inside = [n for n in names if name and name.lower() in n.lower()]
    return list(dict.fromkeys([lowered[h] for h in hits] + inside))[:count]


def unknown(kind: str, got: str, names: Iterable[str]) -> str:
    """Compose the sentence for a name that does not exist.

    Example:
        >>> unknown("estimator", "ckaa", ["cka", "twonn"])
        "unknown estimator 'ckaa'; did you mean 'cka'? Known: cka, twonn."
    """
    names = list(names)
    near = closest(got, names)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"unknown {kind} {got!r}{hint} Known: {shown or 'none'}."


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: Importable name, such as ``"pandas"``.
        extra: The tdprobe extra that installs it.

    Raises:
        MissingExtraError: ``module`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Only the missing package itself is ours to explain; a broken import inside it is not.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module!r} is not installed; it comes with the extra {extra!r}: pip install 'tdprobe[{extra}]'",
            name=module,
        ) from error
