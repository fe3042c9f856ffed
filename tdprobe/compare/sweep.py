"""Run checkpoints over the same rows and score all layers against all layers."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm

from tdprobe import hf
from tdprobe.compare.banks import Banks
from tdprobe.compare.checkpoints import Checkpoint, as_checkpoints, need_one_at_a_time
from tdprobe.compare.rows import LayerRows, check_batches, is_per_text, joined, parted_name, rows_of
from tdprobe.compare.versions import run_facts
from tdprobe.errors import ConfigError
from tdprobe.estimator import Estimator
from tdprobe.hooks.match import block_pattern, compile_pattern
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.score_blocks import score_blocks
from tdprobe.latent.scorer import DEFAULT_MAX_NORM, DEFAULT_PORTION, Scorer, check_scoring, tokens_text
from tdprobe.modules import user_model
from tdprobe.registry import Mode
from tdprobe.stream.outliers import MIN_ROWS
from tdprobe.stream.tokens import TokenClause
from tdprobe.tables import ScoreTable


class LayerComparison:
    """A comparison that can be interrupted: what finished batches brought is kept.

    Args:
        models: See :func:`compare_layers`, as for the other arguments.
    """

    def __init__(
        self,
        models: Mapping[str, Any] | Any,
        layers: str | Mapping[str, str] | None = None,
        estimators: Sequence[str | Estimator] = ("cka",),
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
        **scoring: Any,
    ) -> None:
        self.checkpoints = as_checkpoints(models, dtype=dtype, device=device)
        self.estimators = resolve_estimators(estimators, mode)
        self._scoring = check_scoring(scoring)
        self._layers = _patterns(self.checkpoints, layers)
        self._rows: dict[str, Any] = {"tokens": tokens, "skip_first": skip_first}
        self._per_text = is_per_text(TokenClause(**self._rows))
        self.scorer = Scorer(self.estimators, rows_per_update, max_norm, **self._scoring)
        self._banks = Banks(bank_size)
        self._runs = 0
        self._tokenizing: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
        self._progress = progress
        facts = {"tokens": tokens_text(tokens), "skip_first": skip_first, "mode": mode}
        self.meta: dict[str, Any] = {**facts, "checkpoints": {}}
        self.one_at_a_time = need_one_at_a_time(self.checkpoints) if one_at_a_time is None else one_at_a_time

    def run(self, batches: Iterable[Any]) -> None:
        """Run every checkpoint over the batches; may be called again with more.

        Raises:
            ConfigError: There is no batch, or a pattern matches nothing, or the checkpoints' rows differ.
        """
        batches = check_batches(batches)
        self._runs += 1
        if self.one_at_a_time:
            self._run_one_by_one(batches)
        else:
            self._run_together(batches)

    @property
    def n_rows(self) -> int:
        """Rows that every checkpoint has contributed so far."""
        return self._banks.n if self.one_at_a_time else self.scorer.n

    def scores(self) -> ScoreTable:
        """Score what has been run so far.

        Raises:
            StateError: Nothing has been run.
            ConfigError: There are fewer rows than an estimator needs.
        """
        scorer = self._scorer_of_banks() if self.one_at_a_time else self.scorer
        labels = [parted_name(name) for name in scorer.layers]
        blocks = score_blocks(scorer.scored(), self.estimators, labels)
        return ScoreTable(blocks, {**self.meta, **scorer.facts(), **run_facts()})

    # All checkpoints in memory: rows of a batch meet at once, and nothing but sums is kept.

    def _run_together(self, batches: Iterable[Any]) -> None:
        with ExitStack() as stack:
            loaded = [stack.enter_context(checkpoint.loaded()) for checkpoint in self.checkpoints]
            pairs = list(zip(self.checkpoints, loaded, strict=True))
            hooked = [stack.enter_context(self._factory(c, m).prepare(m.model)) for c, m in pairs]
            names = [checkpoint.name for checkpoint in self.checkpoints]
            streams = [self._batches(batches, c, m) for c, m in pairs]
            for number, inputs in enumerate(self._shown(_zipped(streams), _length(streams[0]))):
                parts = [rows_of(h, batch, self._number(number)) for h, batch in zip(hooked, inputs, strict=True)]
                batch, left_out = joined(dict(zip(names, parts, strict=True)), self._per_text)
                self.scorer.push(batch)
                self._count_left_out(self.meta.get("rows_left_out", 0) + left_out)

    # One checkpoint in memory: each leaves a bank with the same sampled rows, and the banks are scored.

    def _run_one_by_one(self, batches: Iterable[Any]) -> None:
        # Every checkpoint must walk the same batches: a generator ends, and a data loader may shuffle.
        again = isinstance(batches, (Sequence, hf.TextBatches))
        batches = batches if again else list(batches)
        for checkpoint in self.checkpoints:
            self._fill_bank(checkpoint, batches)
            if not checkpoint.is_loaded:
                gc.collect()

    def _fill_bank(self, checkpoint: Checkpoint, batches: Iterable[Any]) -> None:
        with checkpoint.loaded() as loaded, self._factory(checkpoint, loaded).prepare(loaded.model) as hooked:
            stream = self._batches(batches, checkpoint, loaded)
            for number, inputs in enumerate(self._shown(stream, _length(stream), checkpoint.name)):
                rows = rows_of(hooked, inputs, self._number(number))
                if rows is not None and rows.n:
                    self._banks.add(checkpoint.name, rows)

    def _scorer_of_banks(self) -> Scorer:
        batch, left_out = self._banks.joined()
        self._count_left_out(left_out)
        scorer = Scorer(self.estimators, max(batch.n, MIN_ROWS), self.scorer.max_norm, **self._scoring)
        scorer.push(batch)
        return scorer

    def _factory(self, checkpoint: Checkpoint, loaded: hf.LoadedModel) -> LayerRows:
        pattern = self._layers[checkpoint.name] or block_pattern(user_model(loaded.model))
        about = hf.describe(loaded.model, loaded.tokenizer, revision=loaded.revision)
        self.meta["checkpoints"][checkpoint.name] = {**about, "layers": pattern}
        return LayerRows(pattern, **self._rows)

    def _batches(self, batches: Iterable[Any], checkpoint: Checkpoint, loaded: hf.LoadedModel) -> Iterable[Any]:
        if not isinstance(batches, Sequence) or not isinstance(batches[0], str):
            return batches
        if loaded.tokenizer is None and checkpoint.is_loaded:
            raise ConfigError(
                f"checkpoint {checkpoint.name!r} is a model without a tokenizer, so it cannot read texts; give "
                "tdprobe.hf.LoadedModel(model, tokenizer, name, revision), or batches that are tokenized already"
            )
        device = next(loaded.model.parameters()).device
        return hf.batches(list(batches), loaded.tokenizer, device=device, **self._tokenizing)

    def _shown(self, stream: Iterable[Any], total: int | None, title: str | None = None) -> Iterable[Any]:
        return tqdm(stream, total=total, unit="batch", desc=title, disable=not self._progress)

    def _number(self, batch: int) -> int:
        # Batches of another run are other batches.
        return (self._runs << 32) + batch

    def _count_left_out(self, rows: int) -> None:
        if rows:
            self.meta["rows_left_out"] = rows


def compare_layers(
    models: Mapping[str, Any] | Any,
    batches: Iterable[Any],
    layers: str | Mapping[str, str] | None = None,
    estimators: Sequence[str | Estimator] = ("cka",),
    **options: Any,
) -> ScoreTable:
    r"""Score all layers of one or more checkpoints against all layers of all of them, over the same rows.

    Args:
        models: A model, or a dict from names to checkpoints: a model object, a :class:`tdprobe.hf.LoadedModel`, a
            local folder, ``"name@revision"``, or ``"demo"``.
        batches: What each forward gets: tensors, dicts (a tokenizer's encoding), TensorDicts or
            :class:`tdprobe.hf.TextBatch`; or a list of texts, which each checkpoint's own tokenizer reads.
        layers: Pattern of the layers, or one per checkpoint name; ``None`` takes each model's repeated blocks.
        estimators: Registry names or estimator objects.
        **options: ``tokens="all"``, ``skip_first=1``, ``max_norm=4`` and ``rows_per_update=512`` choose the rows
            as in :class:`tdprobe.latent.LayerScoring`; ``one_at_a_time=None`` loads checkpoints one after the
            other when they would fill more than half of the free memory, and then compares ``bank_size=4096``
            sampled rows, the same in all; ``mode="robust"``, ``groups=8``, ``null=0`` and ``memory_budget`` as in
            :class:`tdprobe.latent.LayerScoring`; ``batch_size=16`` and ``max_length=128`` for texts; ``dtype`` and
            ``device`` for loading; ``progress=True``.

    Returns:
        Scores of every pair of layers, within and across checkpoints.

    Raises:
        ConfigError: An argument is not allowed, a pattern matches nothing, or the checkpoints' rows differ.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> a, b = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)) for _ in range(2))
        >>> table = compare_layers({"a": a, "b": b}, [torch.randn(32, 4)], layers=r"\d", progress=False)
        >>> table.matrix("cka", "a", "b").shape
        (3, 3)
    """
    comparison = LayerComparison(models, layers, estimators, **options)
    comparison.run(batches)
    return comparison.scores()


def _patterns(checkpoints: list[Checkpoint], layers: str | Mapping[str, str] | None) -> dict[str, str | None]:
    names = [checkpoint.name for checkpoint in checkpoints]
    found = layers if isinstance(layers, Mapping) else dict.fromkeys(names, layers)
    if set(found) != set(names):
        raise ConfigError(
            f"layers as a dict needs one pattern for each checkpoint ({', '.join(map(repr, names))}); "
            f"it has {', '.join(map(repr, found)) or 'none'}"
        )
    for pattern in found.values():
        try:
            compile_pattern(pattern or "")
        except re.error as error:
            raise ConfigError(f"the pattern of layers {pattern!r} is no regular expression: {error}") from error
    return dict(found)


def _zipped(streams: list[Iterable[Any]]) -> Iterable[tuple[Any, ...]]:
    # The user's own batches are one iterable for all checkpoints: walking it once for each would drain a generator.
    if all(stream is streams[0] for stream in streams):
        return ((item,) * len(streams) for item in streams[0])
    return zip(*streams, strict=True)


def _length(stream: Iterable[Any]) -> int | None:
    return len(stream) if isinstance(stream, Sized) else None


__all__ = ["LayerComparison", "compare_layers"]
