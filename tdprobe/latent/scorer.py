"""Rows in, scores out: the states that a set of estimators needs, each kept once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError, StateError
from tdprobe.estimator import Estimator, not_finite, warn_not_finite
from tdprobe.latent.group_errors import score_groups
from tdprobe.latent.kept_states import (
    GroupedState,
    Source,
    empty_groups,
    sources_of,
    with_least_work,
    with_rows,
)
from tdprobe.latent.permutation_null import Null, compare_with_null, permutation_null
from tdprobe.latent.score_blocks import Scored
from tdprobe.latent.scoring_options import (
    DEFAULT_GROUPS,
    DEFAULT_MAX_NORM,
    DEFAULT_MEMORY,
    DEFAULT_PORTION,
    check_portion,
    check_scoring,
)
from tdprobe.latent.unscored import count_repeated, warn_left_out, warn_nan_layers
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import State, layer_list
from tdprobe.stream.batch import Batch
from tdprobe.stream.buffer import RowBuffer
from tdprobe.stream.outliers import MIN_ROWS
from tdprobe.stream.rescale import Rescale, check_rescale, selected

# Null scores come from a bank: a stream cannot be shuffled.
NULL_SOURCE = Source(Reservoir())


@dataclass
class Scorer:
    """Keep one state per source over all layers.

    Attributes:
        estimators: By label.
        portion: Rows per update, 8 or more.
        max_norm: Rows longer than this many median lengths are left out; ``None`` keeps all.
        rescale: How rows are scaled first, see `selected`.
        groups: Groups of rows for standard errors; 0 for none.
        null: Permutations for null scores of pairs; 0 for none.
        memory_budget: Bytes that the state of a statistic may take.
        whole: The first batch will be the only one: of several routes to one value the cheapest is taken.
        routes: What each estimator reads; by default what it asks for, or cheaper where memory is short.
        n: Rows seen so far, with those that are left out.
    """

    estimators: Mapping[str, Estimator]
    portion: int = DEFAULT_PORTION
    max_norm: float | None = DEFAULT_MAX_NORM
    groups: int = DEFAULT_GROUPS
    null: int = 0
    memory_budget: float = DEFAULT_MEMORY
    rescale: Rescale | None = None
    whole: bool = False
    routes: Mapping[str, Source] | None = None
    layers: tuple[str, ...] = ()
    n: int = 0
    _dropped: int = 0
    _duplicates: dict[str, int] = field(default_factory=dict)
    _left_out: dict[str, str] = field(default_factory=dict)
    _sources: dict[str, Source] = field(default_factory=dict)
    _states: dict[Source, GroupedState] = field(default_factory=dict)
    _buffer: RowBuffer = field(init=False)

    def __post_init__(self) -> None:
        check_rescale(self.rescale, self.max_norm)
        check_portion(self.portion)
        check_scoring({"groups": self.groups, "null": self.null, "memory_budget": self.memory_budget})
        self._buffer = RowBuffer(self.portion)

    def push(self, batch: Batch) -> None:
        """Add the rows of one forward pass to every layer.

        Raises:
            ConfigError: A layer did not run, or gave rows of another width, or a state would take too much memory.
            MissingKeyError: A supervised estimator lacks its targets.
        """
        if batch.n == 0:
            return
        if not self._sources:
            self._begin(batch)
        self._buffer.push(batch)
        self.layers, self.n = self.layers or tuple(batch.rows), self.n + batch.n
        for portion in self._buffer.portions():
            kept = self._ordinary(portion)
            # An update that is interrupted leaves everything as it was, and the next one makes up for it.
            self._states = with_rows(self._states, kept) if kept is not None else self._states
            self._dropped += portion.n - (kept.n if kept is not None else 0)

    def flush(self) -> None:
        """End a part of the stream: what is left of its rows becomes a portion, if they are enough for one."""
        rest = self._rest() if self._buffer.n >= MIN_ROWS else None
        if rest is None:
            return
        self._states = with_rows(self._states, rest)
        self._dropped += self._buffer.n - rest.n
        self._buffer.clear()

    def _begin(self, batch: Batch) -> None:
        sources = dict(self.routes or sources_of(self.estimators, batch, self.memory_budget, self.whole))
        widths = [x.shape[-1] for x in batch.rows.values()]
        wanted = [*sources.values(), *([NULL_SOURCE] if self.null else [])]
        self._states = {source: empty_groups(source, widths, self.groups) for source in dict.fromkeys(wanted)}
        self._sources = sources

    @property
    def n_dropped(self) -> int:
        """Outlying rows that are left out so far."""
        rest = self._rest()
        return self._dropped + self._buffer.n - (rest.n if rest is not None else 0)

    def states(self) -> dict[str, State]:
        """Return the state behind each estimator over every row so far, by label, without ending the stream.

        Raises:
            StateError: No row has come.
        """
        totals = {source: held.total() for source, held in self.kept().items()}
        return {label: totals[source] for label, source in self._sources.items()}

    def scores(self) -> dict[str, Tensor]:
        """Score all layers.

        Returns:
            By label: (layers,) for layer estimators, (layers, layers) for pair estimators.
        """
        return {label: scored.score for label, scored in self.scored().items()}

    def scored(self) -> dict[str, Scored]:
        """Score all layers, with errors, null scores and the rows behind them.

        Estimators that cannot score these rows are left out, with a warning.

        Raises:
            StateError: No row has come.
            ConfigError: No estimator can score these rows.
        """
        self._require_rows()
        found: dict[str, Scored] = {}
        notes: dict[str, TensorDict] = {}
        failed: dict[str, ConfigError] = {}
        # One source after the other, so that what is merged for one is gone before the next.
        for source, named in self._readers().items():
            scores, errors, n = score_groups(named, self.kept([source])[source], failed)
            notes |= scores
            for label, one in scores.items():
                se = one.get("se", errors.get(label))
                found[label] = Scored(one["score"], n, source.statistic.route, se)
        self._left_out = warn_left_out(failed, notes)
        bad = [name for scores in notes.values() for name in not_finite(scores, self.layers)]
        warn_not_finite(list(dict.fromkeys(bad)))
        warn_nan_layers(notes, self.estimators, self.layers)
        self._duplicates = count_repeated(notes, self.layers)
        for label, null in self._nulls(dict(found)) if self.null else ():
            found[label] = replace(found[label], null=null)
        return {label: found[label] for label in self.estimators if label in found}

    def _readers(self) -> dict[Source, dict[str, Estimator]]:
        found: dict[Source, dict[str, Estimator]] = {}
        for label, source in self._sources.items():
            found.setdefault(source, {})[label] = self.estimators[label]
        return found

    def _nulls(self, scored: Mapping[str, Scored]) -> Iterator[tuple[str, Null]]:
        bank: Any = self.kept([NULL_SOURCE])[NULL_SOURCE].total()
        widths = [x.shape[-1] for x in layer_list(bank.rows)]
        for source, named in self._readers().items():
            pairs = {label: item for label, item in named.items() if item.spec.kind == "pair" and label in scored}
            if not pairs:
                continue
            route = with_least_work(source, list(pairs.values()), widths * 2, len(bank.ids), self.memory_budget)
            portion = self.portion if route == source else len(bank.ids)
            chunk = route.most_layers(widths, self.memory_budget) // 2
            drawn = permutation_null(bank, self.null, partial(self._scored_by, pairs, route, portion), max(1, chunk))
            for label, item in pairs.items():
                yield label, compare_with_null(scored[label].score, drawn[label], item.spec)

    def _scored_by(self, named: Mapping[str, Any], source: Source, portion: int, batch: Batch) -> dict[str, Tensor]:
        """Score other rows by the same route, or by a cheaper one to the same values."""
        portion = min(portion, max(batch.n, MIN_ROWS))
        scorer = Scorer(named, portion, None, 0, 0, routes=dict.fromkeys(named, source))
        scorer.push(batch)
        with warnings.catch_warnings():
            # What there is to say has been said of the rows as they are, once.
            warnings.simplefilter("ignore")
            return scorer.scores()

    def resume(self, batch: Batch, states: Iterable[Sequence[State | None]], n: int, dropped: int) -> None:
        """Go on from `kept` of other such scorers, merged: their layers, without rows, their states and counts."""
        self._begin(batch)
        self._states = {key: GroupedState(tuple(held)) for key, held in zip(self._states, states, strict=True)}
        self.layers, self.n, self._dropped = tuple(batch.rows), n, dropped

    def facts(self) -> dict[str, Any]:
        """Return what a table says about the rows and how they were scored."""
        facts = {
            "estimators": {label: repr(estimator) for label, estimator in self.estimators.items()},
            "rows": self.n,
            "outliers": self.n_dropped,
            "max_norm": self.max_norm,
            "rows_per_update": self.portion,
        }
        # Rows that repeat an earlier one, by layer, which estimators of neighbours count; estimators without a score.
        more = {
            "permutations": self.null,
            "duplicates": self._duplicates,
            "left_out": self._left_out,
            "rescale": self.rescale,
        }
        return facts | {name: value for name, value in more.items() if value}

    def kept(self, sources: Iterable[Source] | None = None) -> dict[Source, GroupedState]:
        """Return what is kept of every row so far, in groups of rows; of some sources, or all."""
        self._require_rows()
        rest = self._rest()
        states = self._states if sources is None else {source: self._states[source] for source in sources}
        return with_rows(states, rest) if rest is not None else states

    def _require_rows(self) -> None:
        if self.n == 0:
            raise StateError(
                "no row has been scored yet: run the model inside the block first, on texts with tokens that tokens= "
                "and skip_first= leave to be scored"
            )

    def _rest(self) -> Batch | None:
        return self._ordinary(self._buffer.rest()) if self._buffer.n else None

    def _ordinary(self, batch: Batch) -> Batch | None:
        kept = selected(batch, self.max_norm, self.rescale)
        # Too few to be worth an update of their own; without any other rows, the estimator will say so.
        begun = any(held.filled for held in self._states.values())
        return None if kept.n < MIN_ROWS and (begun or not kept.n) else kept
