"""The names that a model's forward takes."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from tdprobe.errors import ConfigError, closest


class Signature:
    """The names that a model's forward takes.

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owner = type(model).__name__
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = inspect.Parameter
        self.named = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        extra = [p for p in parameters if p.kind is kinds.VAR_KEYWORD]
        self.open = bool(extra)
        self.documented = set(self.named).union(*(_typed_names(p.annotation) for p in extra))

    def check(self, names: Sequence[str]) -> None:
        """Refuse names that forward does not document.

        Raises:
            ConfigError: A name is unknown; the closest known ones are shown.
        """
        unknown = [name for name in names if name not in self.documented]
        if unknown:
            near = closest(unknown[0], self.named)
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            raise ConfigError(
                f"the forward of {self._owner} takes no {', '.join(map(repr, unknown))}{hint}; "
                f"it takes {', '.join(self.named)}"
            )

    def warn_of_near(self, names: Sequence[str]) -> None:
        """Warn of a name that forward does not take and that looks like a slip: it would be left out in silence."""
        for name in names:
            near = difflib.get_close_matches(name, self.documented - set(names), n=1, cutoff=0.85)
            if name not in self.documented and near:
                message = (
                    f"the key {name!r} is not given to the model; did you mean {near[0]!r}? in_keys= says which are"
                )
                warnings.warn(message, stacklevel=2)


def _typed_names(annotation: Any) -> set[str]:
    """Read the names out of ``**kwargs: Unpack[SomeTypedDict]``."""
    return {name for arg in getattr(annotation, "__args__", ()) for name in getattr(arg, "__annotations__", ())}
