"""A comparison of checkpoints: run them over the same rows, keep what these leave behind, and score it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tdprobe import hf
from tdprobe.compare.banks import Banks
from tdprobe.compare.checkpoints import Checkpoint, as_checkpoints, need_one_at_a_time
from tdprobe.compare.pool import Pool
from tdprobe.compare.ranks import Ranks
from tdprobe.compare.reading import Reading, require_no_targets
from tdprobe.compare.rows import check_batches, joined, parted_name, rows_of
from tdprobe.compare.saved import SavedRows, check_same_data, check_same_rows, one_by_one
from tdprobe.compare.sharing import Sharing
from tdprobe.compare.versions import run_facts
from tdprobe.compare.walking import Walking
from tdprobe.errors import ConfigError, StateError
from tdprobe.estimator import Estimator
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.score_blocks import score_blocks
from tdprobe.latent.scorer import Scorer
from tdprobe.latent.scoring_options import DEFAULT_MAX_NORM, DEFAULT_PORTION, check_scoring
from tdprobe.registry import Mode
from tdprobe.stats.sync import DEFAULT_TIMEOUT
from tdprobe.stream.outliers import MIN_ROWS
from tdprobe.stream.rescale import check_rescale
from tdprobe.tables import ScoreTable


class LayerComparison:
    """A comparison that can be interrupted: what finished batches brought is kept.

    Args:
        models: See :func:`tdprobe.compare.compare_layers`, as for the other arguments.
    """

    def __init__(
        self,
        models: Mapping[str, Any] | Any,
        layers: str | Mapping[str, str] | None = None,
        estimators: Sequence[str | Estimator] | Mapping[str, str | Estimator] = ("cka",),
        *,
        tokens: Any = "all",
        skip_first: int = 1,
        rows_per_update: int = DEFAULT_PORTION,
        max_norm: float | None = DEFAULT_MAX_NORM,
        one_at_a_time: bool | None = None,
        bank_size: int = 4096,
        batch_size: int = 16,
        max_length: int = 128,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        mode: Mode = "robust",
        unit: int | None = None,
        parts: str | Path | None = None,
        distributed: bool | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        **scoring: Any,
    ) -> None:
        self.checkpoints = as_checkpoints(models, dtype=dtype, device=device)
        self.estimators = require_no_targets(resolve_estimators(estimators, mode))
        reading = {"tokens": tokens, "skip_first": skip_first, "batch_size": batch_size, "max_length": max_length}
        self._reading = Reading(self.checkpoints, layers, **reading)
        self._scoring: dict[str, Any] = {"portion": rows_per_update, "max_norm": max_norm, **check_scoring(scoring)}
        check_rescale(self._scoring["rescale"], max_norm)
        self._pool, self._banks = Pool(self._scorer), Banks(bank_size)
        self.ranks = Ranks.here(distributed, timeout)
        sharing = Sharing(self.ranks, parts) if parts is not None or self.ranks.world > 1 else None
        self._walking = Walking(self._reading, sharing, unit, rows_per_update, progress and self.ranks.first)
        self._data: list[dict[str, Any]] = []
        facts = {**self._reading.selection, "mode": mode}
        self.meta: dict[str, Any] = {**facts, "checkpoints": self._walking.about}
        self._saved = self._with_saved()
        turns = one_by_one(self._saved, one_at_a_time)
        self.one_at_a_time = need_one_at_a_time(self.checkpoints) if turns is None else turns

    def _with_saved(self) -> dict[str, SavedRows]:
        """Put rows that were saved into their banks."""
        named = {checkpoint.name: checkpoint.rows for checkpoint in self.checkpoints}
        saved = {name: rows.matching(self._reading.layers[name]) for name, rows in named.items() if rows is not None}
        check_same_rows(saved, self._reading.selection)
        for name, rows in saved.items():
            self._banks[name].put(rows.layers, rows.state)
            self._walking.about[name] = dict(rows.about)
        return saved

    def run(self, batches: Iterable[Any]) -> None:
        """Run every checkpoint over the batches; may be called again with more.

        Raises:
            ConfigError: There is no batch, or a pattern matches nothing, or the checkpoints' rows differ.
            RankError: Another process that shares the work has ended or is silent.
        """
        batches = check_batches(batches)
        self._walking.runs += 1
        if self.one_at_a_time:
            self._run_one_by_one(batches)
        else:
            self._run_together(batches)

    @property
    def n_rows(self) -> int:
        """Rows that every checkpoint has contributed so far."""
        return self._banks.n if self.one_at_a_time else self._pool.n

    def scores(self) -> ScoreTable:
        """Score what has been run so far; of several processes, the first one does.

        Raises:
            StateError: Nothing has been run, or this is not the first process.
            ConfigError: There are fewer rows than an estimator needs.
        """
        if not self.ranks.first:
            raise StateError(f"this is rank {self.ranks.rank}, and what all have run is on rank 0: score there")
        if not (self._banks.sampled if self.one_at_a_time else self._pool.n):
            raise StateError(f"no row has been scored yet: run the comparison first{self._reading.clause.asks}")
        scorer, left_out = self._scorer_of_banks() if self.one_at_a_time else (self._pool.scorer(), self._pool.left_out)
        labels = [parted_name(name) for name in scorer.layers]
        blocks = score_blocks(scorer.scored(), self.estimators, labels)
        facts = {**self.meta, **({"rows_left_out": left_out} if left_out else {})}
        return ScoreTable(blocks, {**facts, **scorer.facts(), **run_facts()})

    def saved_rows(self, name: str | None = None) -> SavedRows:
        """Return the sampled rows of a checkpoint, to ``save`` and to compare with others when the model is gone.

        Args:
            name: Which one; may be left out where only one was run.

        Raises:
            StateError: No sample was kept: rows are sampled with ``one_at_a_time=True``.
            ConfigError: There is no such checkpoint, or more than one.
        """
        names = [checkpoint.name for checkpoint in self.checkpoints if checkpoint.rows is None]
        name = names[0] if name is None and len(names) == 1 else name
        if name not in names:
            raise ConfigError(
                f"name one of the checkpoints that were run ({', '.join(map(repr, names))}); got {name!r}"
            )
        bank = self._banks[name]
        if bank.state is None:
            raise StateError(f"no rows of {name!r} were sampled: run the comparison with one_at_a_time=True first")
        return SavedRows(name, bank.layers, bank.state, self._walking.about[name], self._reading.selection, self._data)

    @property
    def kept(self) -> str:
        """Say where parts are from which the same comparison can go on; empty where there are none."""
        return self._walking.sharing.kept() if self._walking.sharing is not None else ""

    def finish(self) -> None:
        """Delete the parts that were kept in case of a failure; every process calls it when results are safe."""
        if self._walking.sharing is not None:
            self._walking.sharing.finish()

    # All checkpoints in memory: rows of a batch meet at once, and nothing but sums is kept.

    def _run_together(self, batches: Iterable[Any]) -> None:
        with ExitStack() as stack:
            entered = {checkpoint.name: self._walking.enter(stack, checkpoint) for checkpoint in self.checkpoints}
            streams = {c.name: self._reading.stream(batches, c, entered[c.name][0]) for c in self.checkpoints}

            def read(number: int, inputs: tuple[Any, ...]) -> None:
                pairs = zip(entered.items(), inputs, strict=True)
                parts = {name: rows_of(hooked, batch, number) for (name, (_, hooked)), batch in pairs}
                self._pool.push(*joined(parts, self._reading.per_text))

            config = {"estimators": {label: repr(item) for label, item in self.estimators.items()}, **self._scoring}
            config["rows_per_update"] = config.pop("portion")
            self._walking.run(batches, streams, read, self._pool, config)

    # One checkpoint in memory: each leaves a bank with the same sampled rows, and the banks are scored.

    def _run_one_by_one(self, batches: Iterable[Any]) -> None:
        # Every checkpoint must walk the same batches: a generator ends, and a data loader may shuffle.
        again = isinstance(batches, (Sequence, hf.TextBatches))
        batches = batches if again else list(batches)
        self._data.append(self._reading.data(batches))
        check_same_data(self._saved, self._walking.runs, self._data[-1])
        for place, checkpoint in enumerate(self.checkpoints):
            if checkpoint.rows is None:
                self._fill_bank(f"checkpoint-{place}", checkpoint, batches)
            if not checkpoint.is_loaded:
                gc.collect()

    def _fill_bank(self, place: str, checkpoint: Checkpoint, batches: Iterable[Any]) -> None:
        bank = self._banks[checkpoint.name]
        with ExitStack() as stack:
            loaded, hooked = self._walking.enter(stack, checkpoint)

            def read(number: int, inputs: tuple[Any, ...]) -> None:
                rows = rows_of(hooked, inputs[0], number)
                if rows is not None and rows.n:
                    bank.push(rows)

            streams = {checkpoint.name: self._reading.stream(batches, checkpoint, loaded)}
            self._walking.run(batches, streams, read, bank, {"bank_size": self._banks.size}, place)

    def _scorer_of_banks(self) -> tuple[Scorer, int]:
        batch, left_out = self._banks.joined()
        scorer = self._scorer(portion=max(batch.n, MIN_ROWS), whole=True)
        scorer.push(batch)
        return scorer, left_out

    def _scorer(self, **options: Any) -> Scorer:
        return Scorer(self.estimators, **{**self._scoring, **options})
