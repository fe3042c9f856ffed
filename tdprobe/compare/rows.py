"""The rows that a checkpoint brings, batch by batch, and how they meet those of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import chain
from typing import Any

import torch
from tensordict import is_tensor_collection
from torch import Tensor

from tdprobe import hf
from tdprobe.errors import ConfigError
from tdprobe.latent.layer_stream import LayerStreaming, StreamContext
from tdprobe.modules import HookedModule
from tdprobe.stats.hashing import mix64
from tdprobe.stream.batch import Batch
from tdprobe.stream.call import Call
from tdprobe.stream.ids import content_ids
from tdprobe.stream.tokens import TokenClause

# No module name holds it.
_JOINT = " › "


def is_per_text(clause: TokenClause) -> bool:
    """Tell whether a clause gives one row per text, which pairs texts whatever their tokens are."""
    return isinstance(clause.tokens, str) and clause.tokens in {"last", "mean"}


class LatestRows(StreamContext):
    """Keep the rows of the latest forward pass.

    Rows are numbered by their batch and their place in it, since every checkpoint walks the same batches. Rows of
    tokens are also numbered by the tokens of their text: other tokens are other rows.
    """

    batch: Batch | None = None
    number: int = 0
    calls: int = 0

    def consume(self, batch: Batch) -> None:
        """Keep the rows until the next batch."""
        self.batch = batch

    def _ids(self, call: Call, n: int) -> Tensor:
        selection = self._selection
        samples = torch.arange(n, device="cpu") if selection is None else selection.sample
        ids = mix64(mix64(samples) ^ self.number)
        if selection is None or is_per_text(self.factory.clause):  # ty: ignore[missing-attribute]
            return ids
        content = content_ids(call)
        ids = ids if content is None else ids ^ content[samples]
        return mix64(ids ^ mix64(selection.position))


class LayerRows(LayerStreaming):
    """Stream rows for a comparison; see :class:`tdprobe.latent.layer_stream.LayerStreaming`."""

    _hooking_context_class = LatestRows


def rows_of(hooked: HookedModule, batch: Any, number: int) -> Batch | None:
    """Run one batch without gradients and return the rows that it brought.

    Args:
        hooked: A model inside the context of :class:`LayerRows`.
        batch: What its forward takes.
        number: Number of the batch, the same for every checkpoint.
    """
    context: LatestRows = hooked.hooking_context
    context.batch, context.number, context.calls = None, number, context.calls + 1
    inputs = batch.inputs if isinstance(batch, hf.TextBatch) else batch
    with torch.no_grad():
        hooked(*inputs) if isinstance(inputs, (tuple, list)) else hooked(inputs)
    # A pass may end after the last layer only where no layer runs a second time.
    context.factory.early_stop = set(context.n_fired.values()) == {context.calls}
    return context.batch


def joined(parts: Mapping[str, Batch | None], per_text: bool) -> tuple[Batch, int]:
    """Put the rows of all checkpoints for one batch side by side.

    Args:
        parts: The rows by checkpoint.
        per_text: Rows stand for texts: those that some checkpoint lacks are left out.

    Returns:
        The rows of all layers, each named by :func:`joint_name`, and the number of rows left out.

    Raises:
        ConfigError: The rows are not those of the same tokens.
    """
    found = {name: part for name, part in parts.items() if part is not None}
    first = next(iter(found.values()), None)
    alike = first is not None and all(torch.equal(part.ids, first.ids) for part in found.values())
    if first is None or len(found) < len(parts) or not (alike or per_text):
        counts = ", ".join(f"{name!r}: {part.n if part else 0}" for name, part in parts.items())
        raise ConfigError(
            f"the checkpoints give rows of different tokens for one batch (rows {counts}), so there is nothing to "
            "pair; compare one row per text: tokens='last' or tokens='mean'"
        )
    if alike:
        return _side_by_side(found), 0
    common = set.intersection(*(set(part.ids.tolist()) for part in found.values()))
    kept = {name: _kept(part, common) for name, part in found.items()}
    return _side_by_side(kept), max(part.n for part in found.values()) - len(common)


def joint_name(checkpoint: str, layer: str) -> str:
    """Name a layer among those of all checkpoints, for errors to show."""
    return f"{checkpoint}{_JOINT}{layer}"


def parted_name(name: str) -> tuple[str, str]:
    """Return the checkpoint and the layer of a joint name."""
    checkpoint, _, layer = name.rpartition(_JOINT)
    return checkpoint, layer


def _kept(part: Batch, common: set[int]) -> Batch:
    # Samples come in the order of the batch in every checkpoint, so the common ones line up.
    take = torch.tensor(
        [place for place, key in enumerate(part.ids.tolist()) if key in common], dtype=torch.long, device="cpu"
    )
    return part.select(take)


def _side_by_side(parts: Mapping[str, Batch]) -> Batch:
    first = next(iter(parts.values()))
    device = next(iter(first.rows.values())).device
    rows = {
        joint_name(name, layer): values.to(device)
        for name, part in parts.items()
        for layer, values in part.rows.items()
    }
    return Batch(rows, first.ids)


def check_batches(batches: Any) -> Iterable[Any]:
    """Return batches, or a list of texts, that can be walked.

    Raises:
        ConfigError: There is none, or it is a single batch.
    """
    single = isinstance(batches, (str, bytes, Tensor, Mapping, hf.TextBatch)) or is_tensor_collection(batches)
    if single or not isinstance(batches, Iterable):
        raise ConfigError(
            "batches is a list (or another iterable) of texts, or of what the model takes; got one "
            f"{type(batches).__name__}: put it into a list"
        )
    if isinstance(batches, Sized) and not len(batches):
        raise ConfigError("there is nothing to compare on: batches is empty")
    if isinstance(batches, Sequence) or hasattr(batches, "tolist"):
        batches = batches if isinstance(batches, Sequence) else batches.tolist()
        return batches
    if isinstance(batches, Sized):
        return batches
    rest = iter(batches)
    for first in rest:
        return [first, *rest] if isinstance(first, str) else chain([first], rest)
    raise ConfigError("there is nothing to compare on: batches is empty")
