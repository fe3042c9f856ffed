"""How checkpoints read batches: which of their layers, which tokens, and how texts become batches."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tdprobe import hf
from tdprobe.compare.checkpoints import Checkpoint
from tdprobe.compare.rows import LayerRows, is_per_text
from tdprobe.compare.units import data_facts, unit_size
from tdprobe.errors import ConfigError
from tdprobe.estimator import Estimator
from tdprobe.hooks.match import block_pattern, compile_pattern
from tdprobe.modules import input_device, user_model
from tdprobe.stream.tokens import TokenClause, tokens_text


class Reading:
    """Hold the choices that decide what the rows of a checkpoint are.

    Args:
        checkpoints: All of them.
        layers: Pattern of the layers, or one per checkpoint name; ``None`` takes each model's repeated blocks.
        tokens: Which tokens count.
        skip_first: Real tokens at the start of each text that never count.
        batch_size: Texts of a batch.
        max_length: Tokens of a text.

    Raises:
        ConfigError: A pattern is no regular expression, one is missing, or the tokens mean nothing.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        layers: str | Mapping[str, str] | None,
        *,
        tokens: Any,
        skip_first: int,
        batch_size: int,
        max_length: int,
    ) -> None:
        self.layers = _patterns(checkpoints, layers)
        self._rows: dict[str, Any] = {"tokens": tokens, "skip_first": skip_first}
        self.clause = TokenClause(**self._rows)
        self.per_text = is_per_text(self.clause)
        self._tokenizing: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}

    @property
    def selection(self) -> dict[str, Any]:
        """Say which tokens count, as JSON can hold it."""
        return {**self._rows, "tokens": tokens_text(self._rows["tokens"])}

    def data(self, batches: Any) -> dict[str, Any]:
        """Say what is read and how it is cut into batches; batches that pass only once say nothing."""
        return {**(data_facts(batches) or {}), **(self._tokenizing if _are_texts(batches) else {})}

    def unit_size(self, unit: int | None, batches: Any, rows_per_update: int) -> int:
        """Return the number of batches in a unit of work; see :func:`tdprobe.compare.units.unit_size`."""
        known = self._tokenizing["batch_size"] if _are_texts(batches) else getattr(batches, "batch_size", None)
        return unit_size(unit, rows_per_update, known or 1)

    def factory(self, checkpoint: Checkpoint, loaded: hf.LoadedModel) -> LayerRows:
        """Return the factory that streams the rows of the layers of a checkpoint."""
        return LayerRows(self.layers[checkpoint.name] or block_pattern(user_model(loaded.model)), **self._rows)

    def stream(self, batches: Any, checkpoint: Checkpoint, loaded: hf.LoadedModel) -> Any:
        """Return the batches that a checkpoint takes, made of texts by its own tokenizer where they are texts.

        Raises:
            ConfigError: It has none.
        """
        if not _are_texts(batches):
            return batches
        if loaded.tokenizer is None and checkpoint.is_loaded:
            raise ConfigError(
                f"checkpoint {checkpoint.name!r} is a model without a tokenizer, so it cannot read texts; give "
                "tdprobe.hf.LoadedModel(model, tokenizer, name, revision), or batches that are tokenized already"
            )
        device = input_device(loaded.model)
        return hf.batches(list(batches), loaded.tokenizer, device=device, **self._tokenizing)


def require_no_targets(estimators: dict[str, Estimator]) -> dict[str, Estimator]:
    """Refuse estimators that read labels or the like, which batches of a comparison do not bring.

    Raises:
        ConfigError: One does.
    """
    for label, estimator in estimators.items():
        if keys := list(map(str, estimator.target_keys)):
            more = ", ".join(f"{key}=..." for key in keys)
            raise ConfigError(
                f"{label!r} reads {' and '.join(map(repr, keys))} along with the layers, which a comparison does not "
                f"have; in Python, LayerScoring(pattern, [{label!r}]) takes them with each call: hooked(x, {more})"
            )
    return estimators


def _are_texts(batches: Any) -> bool:
    return isinstance(batches, Sequence) and isinstance(batches[0], str)


def _patterns(checkpoints: Sequence[Checkpoint], layers: str | Mapping[str, str] | None) -> dict[str, str | None]:
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
