"""Stable names of rows: the same text gives the same number in every layer, checkpoint and rank."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Int
from tdprobe.stats.hashing import mix64
from tdprobe.stream.call import Call
from tdprobe.stream.tokens import Selection


def content_ids(call: Call) -> Int[Tensor, " b"] | None:
    """Hash the real tokens of each row.

    Padding does not count, on either side, so a text keeps its number in any batch.

    Returns:
        (batch,) int64, or ``None`` where the model takes no token ids.
    """
    if call.input_ids is None:
        return None
    ids, positions = call.input_ids.cpu().long(), call.positions.cpu()
    terms = mix64(mix64(ids) + positions)
    return mix64(torch.where(positions >= 0, terms, 0).sum(1))


def row_ids(samples: Int[Tensor, " b"], selection: Selection) -> Int[Tensor, " n"]:
    """Number selected rows by their sample and their position in it.

    Args:
        samples: (batch,) int64 number of each row of the batch.
        selection: The rows that were taken.
    """
    return mix64(samples.cpu()[selection.sample] ^ mix64(selection.position))
