"""One set of scores: an estimator between the layers of two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from tdprobe.errors import ConfigError, unknown

Columns = Literal["layers", "targets"]

# What is known of each score.
ARRAYS = ("values", "se", "null", "null_sd", "p")


class ScoreRow(NamedTuple):
    """One score; ``layer_b`` is ``""`` where the estimator scores single layers, and what is not known is NaN.

    Of a supervised estimator ``layer_b`` is the target, and ``checkpoint_b`` the key that the targets came under.
    ``se`` is the standard error, ``null`` the mean score of unrelated rows, ``p`` how often those score as high.
    """

    checkpoint_a: str
    checkpoint_b: str
    layer_a: str
    layer_b: str
    estimator: str
    score: float
    n: int
    se: float = math.nan
    null: float = math.nan
    p: float = math.nan
    route: str = ""


class ScoreCube(NamedTuple):
    """All scores of one estimator on common axes, NaN where there is none.

    ``values`` is (C, C, L, L) along checkpoint_a, checkpoint_b, layer_a, layer_b; (C, L) for single layers; (C, L, M)
    for the M ``targets`` of a supervised estimator.
    """

    estimator: str
    checkpoints: tuple[str, ...]
    layers: tuple[str, ...]
    values: np.ndarray
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ScoreBlock:
    """Hold the scores of one estimator between the layers of two checkpoints.

    Args:
        estimator: Name of the estimator.
        checkpoint_a: Checkpoint of the rows.
        checkpoint_b: Checkpoint of the columns.
        layers_a: Layer names of the rows, in depth order.
        layers_b: Layer names of the columns; None for an estimator that scores single layers.
        values: Float64, (La, Lb), or (La,) without ``layers_b``. NaN marks a score that does not exist.
        n: Samples behind each score.
        symmetric: Swapping the two sides leaves the score as it is.
        se: Standard error of each score, of the shape of ``values``; None where it is not known.
        null: Mean score of unrelated (permuted) rows; None where it was not asked for.
        null_sd: Its standard deviation.
        p: Share of permutations that score at least as similar.
        route: How the scores came about, such as ``"bank of 4096 rows"``.
        method: Registry name of the estimator, where ``estimator`` is a label of the user's own.
        columns: What ``layers_b`` names: ``"layers"`` of ``checkpoint_b``, or ``"targets"`` of a supervised estimator,
            with ``checkpoint_b`` the key that they came under.

    Raises:
        ConfigError: The values do not fit the layers, a layer is named twice, or the columns are of no known kind.
    """

    estimator: str
    checkpoint_a: str
    checkpoint_b: str
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...] | None
    values: np.ndarray
    n: int
    symmetric: bool = True
    se: np.ndarray | None = None
    null: np.ndarray | None = None
    null_sd: np.ndarray | None = None
    p: np.ndarray | None = None
    route: str = ""
    method: str = ""
    columns: Columns = "layers"

    def __post_init__(self) -> None:
        if self.columns not in get_args(Columns):
            raise ConfigError(unknown("kind of columns", self.columns, get_args(Columns)))
        for side in ("layers_a", "layers_b"):
            names = getattr(self, side)
            if names is None:
                continue
            object.__setattr__(self, side, tuple(names))
            if len(set(names)) < len(names):
                twice = sorted({name for name in names if list(names).count(name) > 1})
                raise ConfigError(f"{side} of {self.title} names a layer twice: {', '.join(twice)}; names must differ.")
        sides = (self.layers_a,) if self.layers_b is None else (self.layers_a, self.layers_b)
        shape = tuple(map(len, sides))
        for name in ARRAYS:
            if getattr(self, name) is None and name != "values":
                continue
            values = np.array(getattr(self, name), dtype=np.float64)
            if values.shape != shape:
                what = "scores" if name == "values" else name
                raise ConfigError(f"{what} of {self.title} have shape {values.shape}, but its layers ask for {shape}.")
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    @property
    def key(self) -> tuple[str, str, str]:
        """The names that tell this block from the others of a table."""
        return self.estimator, self.checkpoint_a, self.checkpoint_b

    @property
    def registry_name(self) -> str:
        """Name of the method in the registry, whatever label the user gave it."""
        return self.method or self.estimator

    @property
    def sides(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Each checkpoint with its layers; targets are neither."""
        rows = (self.checkpoint_a, self.layers_a)
        if self.columns == "targets":
            return (rows,)
        return rows, (self.checkpoint_b, self.layers_b or ())

    @property
    def pair(self) -> str:
        """The checkpoints, for people; one of them for a layer estimator."""
        return self.checkpoint_a if self.layers_b is None else f"{self.checkpoint_a} × {self.checkpoint_b}"

    @property
    def title(self) -> str:
        """The estimator and the checkpoints, for people."""
        return f"{self.estimator}: {self.pair}"

    def over_depth(self) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
        """Yield what runs over the layers: the scores, one column per target, with their errors.

        Yields:
            The target (``""`` for an estimator that scores single layers), (La,) scores, (La,) errors.

        Raises:
            ConfigError: The scores are of pairs of layers.
        """
        if self.columns == "layers" and self.layers_b is not None:
            raise ConfigError(f"{self.title} scores pairs of layers, which are no curves over depth")
        values = self.values.reshape(len(self.layers_a), -1)
        for place, name in enumerate(self.layers_b or ("",)):
            yield name, values[:, place], None if self.se is None else self.se.reshape(values.shape)[:, place]

    def flipped(self) -> ScoreBlock:
        """Return the same scores with the two sides exchanged."""
        if self.layers_b is None:
            return self
        arrays = {name: None if (held := getattr(self, name)) is None else held.T for name in ARRAYS}
        swapped: dict[str, Any] = {"checkpoint_a": self.checkpoint_b, "checkpoint_b": self.checkpoint_a}
        swapped |= {"layers_a": self.layers_b, "layers_b": self.layers_a}
        return replace(self, **swapped, **arrays)

    def only(self, kept: np.ndarray) -> ScoreBlock:
        """Return the block with NaN for the scores that are not kept."""
        return replace(self, values=np.where(kept, self.values, np.nan))

    def rows(self) -> Iterator[ScoreRow]:
        """Yield the scores row by row."""
        pairs = product(self.layers_a, ("",) if self.layers_b is None else self.layers_b)
        columns = [self._column(name) for name in ("values", "se", "null", "p")]
        for (layer_a, layer_b), score, *more in zip(pairs, *columns, strict=True):
            names = (self.checkpoint_a, self.checkpoint_b, layer_a, layer_b, self.estimator)
            yield ScoreRow(*names, score, self.n, *more, self.route)

    def _column(self, name: str) -> list[float]:
        held = getattr(self, name)
        return [math.nan] * self.values.size if held is None else held.ravel().tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScoreBlock):
            return NotImplemented
        fields = ("key", "layers_a", "layers_b", "n", "symmetric", "route", "method", "columns")
        if any(getattr(self, name) != getattr(other, name) for name in fields):
            return False
        pairs = ((getattr(self, name), getattr(other, name)) for name in ARRAYS)
        return all(_alike(mine, theirs) for mine, theirs in pairs)

    __hash__ = None


def _alike(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b, equal_nan=True)
