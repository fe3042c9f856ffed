"""Estimators by label, from what a user gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tdprobe import registry
from tdprobe.errors import ConfigError
from tdprobe.estimator import Estimator
from tdprobe.registry import Mode, check_mode


def resolve_estimators(estimators: Any, mode: Mode = "robust") -> dict[str, Estimator]:
    """Turn names and instances into estimators by label.

    A name is its own label. An object is labelled by the name of its method, or, where that is taken,
    ``"cka-2"`` and so on.

    Args:
        estimators: Registry names, estimator objects or classes; or one of them; or a dict from labels to them.
        mode: How estimators that are given by name treat duplicates, few samples and outlying rows.

    Raises:
        ConfigError: A name is unknown, an item is neither, or none is given.

    Example:
        >>> from tdprobe import CkaEstimator
        >>> list(resolve_estimators([CkaEstimator(), "cka"]))
        ['cka-2', 'cka']
    """
    check_mode(mode)
    if isinstance(estimators, Mapping):
        return _labelled(estimators, mode)
    items = list(estimators) if isinstance(estimators, Iterable) and not isinstance(estimators, str) else [estimators]
    if not items:
        raise ConfigError(f"estimators is empty; known ones: {', '.join(registry.names())}")
    labels = {item for item in items if isinstance(item, str)}
    found: dict[str, Estimator] = {}
    for item in items:
        estimator = _estimator(item, mode)
        label = item if isinstance(item, str) else _label(estimator.spec.name, labels)
        labels.add(label)
        found[label] = estimator
    return found


def _estimator(item: Any, mode: Mode) -> Estimator:
    known = isinstance(item, str) or (isinstance(item, type) and issubclass(item, Estimator))
    if not known and not isinstance(item, Estimator):
        names = ", ".join(registry.names())
        raise ConfigError(f"estimators holds registry names ({names}) or estimator objects; got {item!r}")
    return registry.streaming(item, mode)


def _label(name: str, taken: set[str]) -> str:
    label, count = name, 2
    while label in taken:
        label, count = f"{name}-{count}", count + 1
    return label


def _labelled(estimators: Mapping[str, Any], mode: Mode) -> dict[str, Estimator]:
    odd = [label for label in estimators if not isinstance(label, str) or not label]
    if odd or not estimators:
        raise ConfigError(f"estimators as a dict goes from labels (strings) to estimators, got {dict(estimators)!r}")
    return {label: _estimator(item, mode) for label, item in estimators.items()}
