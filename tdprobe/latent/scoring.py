"""Score every layer and every pair of layers while a model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tdprobe.errors import StateError
from tdprobe.estimator import Estimator
from tdprobe.latent.call_items import ItemModule
from tdprobe.latent.estimator_list import resolve_estimators
from tdprobe.latent.layer_stream import LayerStreaming, StreamContext
from tdprobe.latent.score_blocks import score_blocks
from tdprobe.latent.scorer import Scorer
from tdprobe.latent.scoring_options import (
    DEFAULT_GROUPS,
    DEFAULT_MAX_NORM,
    DEFAULT_MEMORY,
    DEFAULT_PORTION,
    check_portion,
    check_scoring,
)
from tdprobe.registry import Mode
from tdprobe.stream.batch import Batch
from tdprobe.stream.rescale import Rescale, check_rescale
from tdprobe.stream.tokens import tokens_text
from tdprobe.tables import ScoreTable


class ScoringContext(StreamContext):
    """A running scoring.

    What finished batches brought survives errors, interrupts and the end of the block; entering again
    goes on from there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reset()

    def reset(self) -> None:
        """Forget every row."""
        factory: LayerScoring = self.factory  # ty: ignore[invalid-assignment]
        self.scorer = Scorer(factory.estimators, **factory.scoring)

    def consume(self, batch: Batch) -> None:
        """Add the rows of one finished forward pass."""
        self.scorer.push(batch)

    def _leave(self, error: BaseException | None = None) -> None:
        super()._leave(error)
        if error is None:
            self.scorer.flush()

    @property
    def n_rows(self) -> int:
        """Rows that every layer has contributed so far."""
        return self.scorer.n

    def scores(self) -> ScoreTable:
        """Score what has been seen so far; the stream can go on afterwards.

        Raises:
            StateError: Nothing has been seen.
            ConfigError: There are fewer rows than any estimator needs; where only some cannot score them, these are
                left out, with a warning.
        """
        factory: LayerScoring = self.factory  # ty: ignore[invalid-assignment]
        scorer = self.scorer
        if not scorer.n:
            raise StateError(f"no row has been scored yet: run the model inside the block first{factory.clause.asks}")
        labels = [(factory.name, layer) for layer in scorer.layers]
        blocks = score_blocks(scorer.scored(), scorer.estimators, labels)
        meta = {
            "model": type(self.model).__name__,
            "layers": factory.key_pattern,
            "tokens": tokens_text(factory.clause.tokens),
            "skip_first": factory.clause.skip_first,
            "mode": factory.mode,
        }
        return ScoreTable(blocks, meta | scorer.facts())


class ScoredModule(ItemModule):
    """A model whose layers are scored as it runs."""

    def scores(self) -> ScoreTable:
        """Score what has been seen so far, in the block or after it; see :meth:`ScoringContext.scores`."""
        return self.hooking_context.scores()


class LayerScoring(LayerStreaming):
    r"""Score the layers that a pattern matches, and every pair of them, in one pass and bounded memory.

    Rows leave the hooks, are collected into portions, update one state per statistic and are dropped. Padding
    never counts. The first real token of each text is left out by default: in decoder models it carries
    activations a thousand times larger than all others, the same for every text, and decides similarities by
    itself. Rows that are still many times longer than usual in some layer are left out too, and counted in
    the table's ``meta["outliers"]``.

    Of a module that runs several times in a forward pass, the last run counts; the first with ``early_stop``.

    Args:
        key_pattern: Regular expression matched from the start of the dotted module name.
        estimators: Registry names or estimator objects, or a dict from labels to them. A name stands for the
            streaming form of its method (``"cka"``: minibatch unbiased linear CKA); an object is taken as it is
            configured.
        relative: Names start at the user's model; ``False`` starts them at the wrapper (``td_module.module``).
        tokens: Which tokens of each row count: ``"last"``, ``"mean"``, ``"all"``, a span, ...;
            see :class:`tdprobe.stream.tokens.TokenClause`.
        skip_first: Real tokens at the start of each row that never count.
        rows_per_update: Rows of one portion, 8 or more. Minibatch estimators compare rows within a portion
            only.
        max_norm: Rows longer than this many median row lengths in any layer are left out of all; ``None``
            keeps them.
        rescale: ``"clip"`` shortens such rows to that length, in the layers where they are longer, instead of leaving
            them out; ``"unit"`` brings every row to length 1, ``"standard"`` to mean 0 and variance 1 over its columns,
            as a layer norm does. Standardising columns would take statistics that a stream does not have.
        early_stop: End calls of the hooked module after the last layer.
        required: A pattern that matches nothing, or layers that never run, are errors.
        name: What the table calls the model.
        mode: How estimators that are given by name treat duplicates, few samples and outlying rows:
            ``"robust"``, or ``"strict"`` as in their papers.
        groups: Groups of rows that are left out in turn to estimate standard errors (jackknife); 0 for none.
        null: Permutations of the rows that show what unrelated layers would score, such as 99; each costs about
            as much as scoring a bank of 4,096 rows with twice as many layers.
        memory_budget: Bytes that a state may take; where an estimator needs more, a cheaper route is taken, with
            a warning, or refused.
        additional_keys: Keys of the input, or keywords, that estimators read besides the layers: attributes,
            labels. By default those that the estimators name.

    Raises:
        ConfigError: An estimator or an argument is unknown; on enter also for a pattern that matches nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        >>> with LayerScoring(r"\d").prepare(model) as hooked:
        ...     out = hooked(torch.randn(64, 8))
        >>> hooked.scores().matrix().shape
        (3, 3)

    References:
        Sun et al. 2024, Massive activations in large language models.
    """

    _hooking_context_class = ScoringContext
    _hooked_module_class = ScoredModule

    def __init__(
        self,
        key_pattern: str,
        estimators: Sequence[str | Estimator] | Mapping[str, str | Estimator] = ("cka",),
        relative: bool = True,
        *,
        tokens: Any = "all",
        skip_first: int = 1,
        rows_per_update: int = DEFAULT_PORTION,
        max_norm: float | None = DEFAULT_MAX_NORM,
        rescale: Rescale | None = None,
        early_stop: bool = False,
        required: bool = True,
        name: str = "model",
        mode: Mode = "robust",
        groups: int = DEFAULT_GROUPS,
        null: int = 0,
        memory_budget: float = DEFAULT_MEMORY,
        additional_keys: Sequence[Any] | None = None,
    ) -> None:
        self.estimators = resolve_estimators(estimators, mode)
        read = (key for estimator in self.estimators.values() for key in estimator.target_keys)
        super().__init__(
            key_pattern,
            relative=relative,
            tokens=tokens,
            skip_first=skip_first,
            early_stop=early_stop,
            required=required,
            additional_keys=list(dict.fromkeys(read)) if additional_keys is None else additional_keys,
        )
        check_portion(rows_per_update)
        check_rescale(rescale, max_norm)
        options = {"groups": groups, "null": null, "memory_budget": memory_budget, "rescale": rescale}
        self.scoring: dict[str, Any] = {"portion": rows_per_update, "max_norm": max_norm, **check_scoring(options)}
        self.mode = mode
        self.name = name
