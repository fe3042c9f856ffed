"""Score all layers of checkpoints against all layers in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tdprobe.compare.ranks import table_of_first
from tdprobe.compare.sweep import LayerComparison
from tdprobe.estimator import Estimator
from tdprobe.tables import ScoreTable


def compare_layers(
    models: Mapping[str, Any] | Any,
    batches: Iterable[Any],
    layers: str | Mapping[str, str] | None = None,
    estimators: Sequence[str | Estimator] | Mapping[str, str | Estimator] = ("cka",),
    **options: Any,
) -> ScoreTable:
    r"""Score all layers of one or more checkpoints against all layers of all of them, over the same rows.

    Args:
        models: A model, or a dict from names to checkpoints: a model object, a :class:`tdprobe.hf.LoadedModel`, a
            local folder, ``"name@revision"``, ``"demo"``, or rows that were sampled of one
            (:class:`tdprobe.compare.SavedRows`, or the path of the file).
        batches: What each forward gets: tensors, dicts (a tokenizer's encoding), TensorDicts or
            :class:`tdprobe.hf.TextBatch`; or a list of texts, which each checkpoint's own tokenizer reads.
        layers: Pattern of the layers, or one per checkpoint name; ``None`` takes each model's repeated blocks.
        estimators: Registry names or estimator objects, or a dict from labels to them.
        **options: ``tokens="all"``, ``skip_first=1``, ``max_norm=4``, ``rescale=None`` and ``rows_per_update=512``
            choose the rows as in :class:`tdprobe.latent.LayerScoring`; ``one_at_a_time=None`` loads checkpoints one
            after the other when they would fill more than half of the free memory, and then compares ``bank_size=4096``
            sampled rows, the same in all; ``mode="robust"``, ``groups=8``, ``null=0`` and ``memory_budget`` as in
            :class:`tdprobe.latent.LayerScoring`; ``batch_size=16`` and ``max_length=128`` for texts; ``dtype`` and
            ``device`` for loading; ``progress=True``. Where a process group of ``torch.distributed`` is initialised
            (unless ``distributed=False``), every process of it calls this with the same arguments: they share the
            batches in units of ``unit`` batches, keep what is finished in the folder ``parts``, wait ``timeout=1800``
            seconds for one another, and all return the table.

    Returns:
        Scores of every pair of layers, within and across checkpoints.

    Raises:
        ConfigError: An argument is not allowed, a pattern matches nothing, or the checkpoints' rows differ.
        RankError: Another process that shares the work has ended or is silent.

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
    table = table_of_first(comparison.ranks, comparison.scores)
    comparison.finish()
    return table
