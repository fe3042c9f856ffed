"""One set of scores: an estimator between the layers of two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from tdprobe.errors import ConfigError


class ScoreRow(NamedTuple):
    """One score; ``layer_b`` is ``""`` where the estimator scores single layers."""

    checkpoint_a: str
    checkpoint_b: str
    layer_a: str
    layer_b: str
    estimator: str
    score: float
    n: int


class ScoreCube(NamedTuple):
    """All scores of one estimator on common axes, NaN where there is none.

    ``values`` is (C, C, L, L) along checkpoint_a, checkpoint_b, layer_a, layer_b; (C, L) for single layers.
    """

    estimator: str
    checkpoints: tuple[str, ...]
    layers: tuple[str, ...]
    values: np.ndarray


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

    Raises:
        ConfigError: The values do not fit the layers, or a layer is named twice.
    """

    estimator: str
    checkpoint_a: str
    checkpoint_b: str
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...] | None
    values: np.ndarray
    n: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        for side in ("layers_a", "layers_b"):
            names = getattr(self, side)
            if names is None:
                continue
            object.__setattr__(self, side, tuple(names))
            if len(set(names)) < len(names):
                twice = sorted({name for name in names if list(names).count(name) > 1})
                raise ConfigError(f"{side} of {self.title} names a layer twice: {', '.join(twice)}; names must differ.")
        values = np.array(self.values, dtype=np.float64)
        sides = (self.layers_a,) if self.layers_b is None else (self.layers_a, self.layers_b)
        if values.shape != (shape := tuple(map(len, sides))):
            raise ConfigError(f"scores of {self.title} have shape {values.shape}, but its layers ask for {shape}.")
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    @property
    def key(self) -> tuple[str, str, str]:
        """The names that tell this block from the others of a table."""
        return self.estimator, self.checkpoint_a, self.checkpoint_b

    @property
    def pair(self) -> str:
        """The checkpoints, for people; one of them for a layer estimator."""
        return self.checkpoint_a if self.layers_b is None else f"{self.checkpoint_a} × {self.checkpoint_b}"

    @property
    def title(self) -> str:
        """The estimator and the checkpoints, for people."""
        return f"{self.estimator}: {self.pair}"

    def flipped(self) -> ScoreBlock:
        """Return the same scores with the two sides exchanged."""
        if self.layers_b is None:
            return self
        sides = (self.checkpoint_b, self.checkpoint_a, self.layers_b, self.layers_a)
        return ScoreBlock(self.estimator, *sides, self.values.T, self.n, self.symmetric)

    def rows(self) -> Iterator[ScoreRow]:
        """Yield the scores row by row."""
        pairs = product(self.layers_a, ("",) if self.layers_b is None else self.layers_b)
        for (layer_a, layer_b), score in zip(pairs, self.values.ravel().tolist(), strict=True):
            yield ScoreRow(self.checkpoint_a, self.checkpoint_b, layer_a, layer_b, self.estimator, score, self.n)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScoreBlock):
            return NotImplemented
        mine, theirs = ((*b.key, b.layers_a, b.layers_b, b.n, b.symmetric) for b in (self, other))
        return mine == theirs and np.array_equal(self.values, other.values, equal_nan=True)

    __hash__ = None
