"""Rows in, scores out: the states that a set of estimators needs, each kept once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe import registry
from tdprobe.errors import ConfigError, StateError
from tdprobe.estimator import Estimator, not_finite, score_all, warn_not_finite
from tdprobe.stats.state import State, Statistic
from tdprobe.stream.batch import Batch
from tdprobe.stream.buffer import RowBuffer
from tdprobe.stream.outliers import MIN_ROWS, check_max_norm, without_outliers
from tdprobe.tables.block import ScoreBlock

DEFAULT_PORTION = 512
# Four median lengths: in language models scores no longer depend on the limit from here down, and rows that are normal
# in two or more dimensions are this long less than once in 50,000.
DEFAULT_MAX_NORM = 4.0


def resolve_estimators(estimators: Any) -> dict[str, Estimator]:
    """Turn names and instances into estimators by label.

    A name is its own label. An object is labelled by the name of its method, or, where that is taken,
    ``"cka-2"`` and so on.

    Args:
        estimators: Registry names, estimator objects or classes; or one of them.

    Raises:
        ConfigError: A name is unknown, an item is neither, or none is given.

    Example:
        >>> from tdprobe import CkaEstimator
        >>> list(resolve_estimators([CkaEstimator(), "cka"]))
        ['cka-2', 'cka']
    """
    items = list(estimators) if isinstance(estimators, Iterable) and not isinstance(estimators, str) else [estimators]
    if not items:
        raise ConfigError(f"estimators is empty; known ones: {', '.join(registry.names())}")
    labels = {item for item in items if isinstance(item, str)}
    found: dict[str, Estimator] = {}
    for item in items:
        estimator = _estimator(item)
        label = item if isinstance(item, str) else _label(estimator.spec.name, labels)
        labels.add(label)
        found[label] = estimator
    return found


def _estimator(item: Any) -> Estimator:
    known = isinstance(item, str) or (isinstance(item, type) and issubclass(item, Estimator))
    if not known and not isinstance(item, Estimator):
        names = ", ".join(registry.names())
        raise ConfigError(f"estimators holds registry names ({names}) or estimator objects; got {item!r}")
    return registry.streaming(item)


def _label(name: str, taken: set[str]) -> str:
    label, count = name, 2
    while label in taken:
        label, count = f"{name}-{count}", count + 1
    return label


def tokens_text(tokens: Any) -> str:
    """Say in a table's ``meta`` which tokens counted, without addresses or the values of a mask.

    Example:
        >>> tokens_text(slice(1, None)), tokens_text(torch.ones(2, 3, dtype=torch.bool)), tokens_text((0, -1))
        ('1:', 'mask (2, 3)', '0, -1')
    """
    if isinstance(tokens, Tensor):
        return f"mask {tuple(tokens.shape)}"
    if isinstance(tokens, slice):
        edges = [tokens.start, tokens.stop] + ([tokens.step] if tokens.step else [])
        return ":".join("" if edge is None else str(edge) for edge in edges)
    if isinstance(tokens, (tuple, list)):
        return ", ".join(map(tokens_text, tokens))
    return getattr(tokens, "__name__", type(tokens).__name__) if callable(tokens) else str(tokens)


@dataclass
class Scorer:
    """Keep one state per statistic over all layers.

    Attributes:
        estimators: By label.
        portion: Rows per update, 8 or more.
        max_norm: Rows longer than this many median lengths are left out; ``None`` keeps all.
        n: Rows seen so far, with those that are left out.
    """

    estimators: dict[str, Estimator]
    portion: int = DEFAULT_PORTION
    max_norm: float | None = DEFAULT_MAX_NORM
    layers: tuple[str, ...] = ()
    n: int = 0
    _dropped: int = 0
    _behind: dict[str, int] = field(default_factory=dict)
    _duplicates: dict[str, int] = field(default_factory=dict)
    _states: dict[Statistic, State] = field(default_factory=dict)
    _buffer: RowBuffer = field(init=False)

    def __post_init__(self) -> None:
        check_max_norm(self.max_norm)
        check_portion(self.portion)
        self._buffer = RowBuffer(self.portion)

    def push(self, batch: Batch) -> None:
        """Add the rows of one forward pass to every layer.

        Raises:
            ConfigError: A layer did not run, or gave rows of another width.
        """
        if batch.n == 0:
            return
        self._buffer.push(batch)
        self.layers = self.layers or tuple(batch.rows)
        self.n += batch.n
        for portion in self._buffer.portions():
            kept = self._ordinary(portion)
            # An update that is interrupted leaves everything as it was, and the next one makes up for it.
            self._states = self._updated(kept) if kept is not None else self._states
            self._dropped += portion.n - (kept.n if kept is not None else 0)

    @property
    def n_dropped(self) -> int:
        """Outlying rows that are left out so far."""
        rest = self._rest()
        return self._dropped + self._buffer.n - (rest.n if rest is not None else 0)

    def states(self) -> dict[Statistic, State]:
        """Return the states over every row so far, without ending the stream.

        Raises:
            StateError: No row has come.
        """
        if self.n == 0:
            raise StateError(
                "no row has been scored yet: run the model inside the block first, on texts with tokens that tokens= "
                "and skip_first= leave to be scored"
            )
        rest = self._rest()
        return self._updated(rest) if rest is not None else dict(self._states)

    def scores(self) -> dict[str, Tensor]:
        """Score all layers.

        Returns:
            By label: (layers,) for layer estimators, (layers, layers) for pair estimators.
        """
        states: dict[Statistic, Any] = self.states()
        found = score_all(self.estimators, states)
        bad = [name for scores in found.values() for name in not_finite(scores, self.layers)]
        warn_not_finite(list(dict.fromkeys(bad)))
        self._behind = {label: int(states[item.statistic()].n) for label, item in self.estimators.items()}
        self._duplicates = self._repeats(found.values())
        return {label: scores["score"] for label, scores in found.items()}

    def rows_behind(self) -> dict[str, int]:
        """Return how many rows the last scores of each estimator come from."""
        return self._behind

    def _repeats(self, found: Iterable[TensorDict]) -> dict[str, int]:
        counts = (scores.get("duplicates", None) for scores in found)
        pairs = (zip(self.layers, count.tolist(), strict=True) for count in counts if count is not None)
        return {name: count for layers in pairs for name, count in layers if count}

    def facts(self) -> dict[str, Any]:
        """Return what a table says about the rows and how they were scored."""
        facts = {
            "estimators": {label: repr(estimator) for label, estimator in self.estimators.items()},
            "rows": self.n,
            "outliers": self.n_dropped,
            "max_norm": self.max_norm,
            "rows_per_update": self.portion,
        }
        # Rows that repeat an earlier one, by layer; estimators of neighbours count them.
        return {**facts, "duplicates": self._duplicates} if self._duplicates else facts

    def _rest(self) -> Batch | None:
        return self._ordinary(self._buffer.rest()) if self._buffer.n else None

    def _ordinary(self, batch: Batch) -> Batch | None:
        kept = without_outliers(batch, self.max_norm)
        # Too few to be worth an update of their own; without any other rows, the estimator will say so.
        return None if kept.n < MIN_ROWS and (self._states or not kept.n) else kept

    def _updated(self, batch: Batch) -> dict[Statistic, State]:
        rows = [batch.rows[name] for name in self.layers]
        states = dict(self._states)
        # The forward pass may run under autocast or inference mode; statistics must not.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
            for statistic in {estimator.statistic() for estimator in self.estimators.values()}:
                state = states.get(statistic)
                state = statistic.init(rows, batch.ids) if state is None else state
                states[statistic] = statistic.update(state, rows, batch.ids)
        return states


def check_portion(portion: Any) -> None:
    """Refuse portions that are too small to be compared within.

    Raises:
        ConfigError: It is no int of at least 8.
    """
    if isinstance(portion, bool) or not isinstance(portion, int) or portion < MIN_ROWS:
        raise ConfigError(f"rows_per_update is a number of rows (an int of at least {MIN_ROWS}), got {portion!r}")


def score_blocks(
    scores: dict[str, Tensor],
    estimators: dict[str, Estimator],
    labels: Sequence[tuple[str, str]],
    n: int | Mapping[str, int],
) -> list[ScoreBlock]:
    """Cut scores over all layers of all checkpoints into one block per pair of checkpoints.

    Args:
        scores: By estimator label: (l,) or (l, l).
        estimators: The estimators by label.
        labels: (checkpoint, layer) of each of the l rows.
        n: Rows behind each score, one number or by estimator label.
    """
    places: dict[str, list[int]] = {}
    for place, (checkpoint, _) in enumerate(labels):
        places.setdefault(checkpoint, []).append(place)
    layers = {name: tuple(labels[i][1] for i in found) for name, found in places.items()}
    blocks = []
    for label, values in scores.items():
        array, symmetric = values.cpu().double().numpy(), estimators[label].spec.symmetric
        count = n if isinstance(n, int) else n[label]
        if array.ndim == 1:
            blocks += [ScoreBlock(label, a, a, layers[a], None, array[i], count) for a, i in places.items()]
            continue
        for position, (a, rows) in enumerate(places.items()):
            for b, columns in list(places.items())[position if symmetric else 0 :]:
                part = array[np.ix_(rows, columns)]
                blocks.append(ScoreBlock(label, a, b, layers[a], layers[b], part, count, symmetric))
    return blocks
