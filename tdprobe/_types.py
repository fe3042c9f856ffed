"""Types that several rooms share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any


class _Inert:
    """Stand in for a jaxtyping class when shapes are not checked at run time."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Any


# Shapes are checked under pytest only (its plugin loads jaxtyping first); importing it otherwise would cost every user.
if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int
else:
    Bool = Float = Int = _Inert


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


__all__ = ["Bool", "Float", "Int", "UnraveledKey"]
