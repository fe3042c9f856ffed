"""One table of estimators: what each is called, what it promises, and which class computes it."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from inspect import signature
from typing import Any, Literal, TypeVar, get_args

from tdprobe.errors import ConfigError, unknown

GROUP = "tdprobe.estimators"
Kind = Literal["layer", "pair", "supervised"]
Mode = Literal["strict", "robust"]
Invariance = Literal["permutation", "orthogonal", "isotropic scaling", "translation", "invertible linear"]


@dataclass(frozen=True)
class Spec:
    """Describe an estimator as data: tests, plots, docs and the command line read the same row.

    Args:
        name: Name in the registry.
        kind: ``"layer"`` (one score per layer), ``"pair"`` (one per two layers) or ``"supervised"``.
        symmetric: Whether swapping the layers of a pair keeps the score.
        bounds: Range of the population value; an unbiased estimate may leave it by its noise.
        larger_means: What a larger score says, such as ``"more similar"``.
        invariant_to: Changes of the columns that keep the score.
        needs: Names of the statistics it can read.
        cost: Leading cost, such as ``"n d^2"``.
        reference: The paper.
        streaming: Constructor arguments for a stream of batches, where they differ from the defaults (``mode``,
            which a stream sets to ``"robust"``, aside).

    Raises:
        ConfigError: A kind or an invariance that does not exist, or bounds out of order.
    """

    name: str
    kind: Kind
    symmetric: bool
    bounds: tuple[float, float]
    larger_means: str
    invariant_to: frozenset[str]
    needs: tuple[str, ...]
    cost: str
    reference: str
    streaming: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check the row."""
        if self.kind not in get_args(Kind):
            raise ConfigError(f"{self.name!r}: {unknown('kind', self.kind, get_args(Kind))}")
        for name in sorted(set(self.invariant_to) - set(get_args(Invariance))):
            raise ConfigError(f"{self.name!r}: {unknown('invariance', name, get_args(Invariance))}")
        if not self.bounds[0] < self.bounds[1]:
            raise ConfigError(f"{self.name!r} has bounds {self.bounds}; allowed is (lower, upper)")

    @property
    def larger_is_similar(self) -> bool | None:
        """Whether larger scores mean more similar layers; ``None`` if the scores say nothing of similarity."""
        words = self.larger_means.lower()
        if any(word in words for word in ("dissimilar", "different", "distan", "less similar", "farther")):
            return False
        return True if "similar" in words else None


_classes: dict[str, Any] = {}
T = TypeVar("T")


def register(spec: Spec) -> Callable[[T], T]:
    """Enter a class into the registry and set its ``spec``.

    Raises:
        ConfigError: Another class holds the name already.
    """

    def enter(cls: Any) -> Any:
        held = _classes.get(spec.name)
        # A module that is loaded again brings its class again; that is the same estimator.
        if held is not None and (held.__module__, held.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"estimator name {spec.name!r} of {cls.__module__}.{cls.__qualname__} is taken by "
                f"{held.__module__}.{held.__qualname__}; choose another name"
            )
        cls.spec = spec
        _classes[spec.name] = cls
        return cls

    return enter


def get(name: str) -> Any:
    """Return the estimator class of a name.

    Raises:
        ConfigError: No such estimator; the message shows the closest names.

    Example:
        >>> get("cka").__name__
        'CkaEstimator'
    """
    if name not in _classes:
        _load()
    if name not in _classes:
        raise ConfigError(unknown("estimator", name, names()))
    return _classes[name]


def names() -> tuple[str, ...]:
    """Return the names of all estimators, those of other packages included, in alphabetical order."""
    _load()
    return tuple(sorted(_classes))


def check_mode(mode: Any) -> Mode:
    """Return a mode, or say which there are.

    ``"strict"`` is the convention of the paper, or of the documented interface; ``"robust"`` what holds up on the
    activations of real models: duplicates, few samples, outlying rows.

    Raises:
        ConfigError: No such mode.
    """
    if mode not in get_args(Mode):
        raise ConfigError(unknown("mode", mode, get_args(Mode)))
    return mode


def streaming(estimator: Any, mode: Mode = "robust") -> Any:
    """Return the estimator to use on a stream of batches.

    Args:
        estimator: A name or class, built with the ``streaming`` arguments of its spec and in this mode, where it
            knows modes; an instance is the user's own choice and comes back as it is.
        mode: ``"robust"`` or ``"strict"``.

    Example:
        >>> streaming("cka").mode, streaming("cka", "strict").minibatch
        ('robust', True)
    """
    cls: Any = get(estimator) if isinstance(estimator, str) else estimator
    if not isinstance(cls, type):
        return cls
    arguments = dict(cls.spec.streaming)
    if "mode" in signature(cls).parameters:
        arguments["mode"] = check_mode(mode)
    return cls(**arguments)


@cache
def _load() -> None:
    """Import every file of every family of estimators, then what other packages declare."""
    latent = importlib.import_module("tdprobe.latent")
    for family in pkgutil.iter_modules(latent.__path__, "tdprobe.latent."):
        if family.ispkg:
            for module in pkgutil.iter_modules(importlib.import_module(family.name).__path__, f"{family.name}."):
                importlib.import_module(module.name)
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # a broken plug-in must not take the others down
            warnings.warn(f"estimators of {entry.value!r} could not be loaded: {error!r}", stacklevel=2)
