"""Types that several rooms share."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from torch import nn


class _Inert:
    """Stand in for a jaxtyping class when shapes are not checked at run time."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Any


# Shapes are checked under pytest only (its plugin loads jaxtyping first); importing it otherwise would cost every user.
if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Real
else:
    Bool = Float = Int = Real = _Inert


class _UnraveledKeyMeta(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        if isinstance(instance, str):
            return True
        return isinstance(instance, tuple) and bool(instance) and all(isinstance(part, str) for part in instance)


class UnraveledKey(metaclass=_UnraveledKeyMeta):
    """Pseudo-type of a TensorDict key: a string or a non-empty flat tuple of strings.

    Example:
        >>> isinstance(("a", "b"), UnraveledKey), isinstance(("a", ("b",)), UnraveledKey)
        (True, False)
    """


def named_forward(model: nn.Module) -> nn.Module:
    """Return the model whose forward names its arguments: inside ``DataParallel`` and its like, which hand all on."""
    inner = model._modules.get("module")
    if inner is None:
        return model
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    hands_on = kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return named_forward(inner) if hands_on else model


__all__ = ["Bool", "Float", "Int", "Real", "UnraveledKey", "named_forward"]
