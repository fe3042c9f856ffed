"""Run-time check of shapes, used by jaxtyping's import hook while tests run (see pyproject.toml)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray
from tensordict import TensorClass

# A TensorClass makes its own constructor, which takes less than its signature states (batch_size may be left
# out); checked like that of a dataclass, it would refuse valid calls. Methods of states are checked all the
# same.
TensorClass.__no_type_check__ = True


def shapes_only(function: Callable) -> Callable:
    """Check the arguments and results of ``function`` whose annotations speak of shapes, and no others.

    Plain types stay unchecked: tests pass wrong ones on purpose, to read the package's own error messages.
    """
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint if _has_shape(hint) else Any for name, hint in hints.items()}
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))
