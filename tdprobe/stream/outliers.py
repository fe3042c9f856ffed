"""Rows with massive activations, which would decide every score by themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.stream.batch import Batch

# Below this the median of the lengths says too little to call a row an outlier.
MIN_ROWS = 8


def check_max_norm(max_norm: float | None) -> None:
    """Refuse a limit that would drop ordinary rows.

    Raises:
        ConfigError: It is neither ``None`` nor a number above 1.
    """
    if max_norm is not None and not (isinstance(max_norm, (int, float)) and 1 < max_norm < math.inf):
        raise ConfigError(
            f"max_norm counts median row lengths (a number above 1); None means no limit; got {max_norm!r}"
        )


def without_outliers(batch: Batch, max_norm: float | None) -> Batch:
    """Leave out the rows that are longer than ``max_norm`` times the median row length in any layer.

    Language models put activations a hundred times longer than all others on a few tokens: one such row among
    thousands makes layers look alike or opposite. A row leaves every layer, so that layers keep the same
    samples. Rows with NaN or infinities stay, so that they show in the score.

    Args:
        batch: Rows of all layers, ``(n, d_layer)`` each, on one device.
        max_norm: The limit, or ``None`` to keep every row.

    Returns:
        The batch itself where nothing is left out, or where it has fewer than 8 rows.

    Example:
        >>> rows = torch.ones(9, 2)
        >>> rows[4] *= 100
        >>> without_outliers(Batch({"layer": rows}, torch.arange(9)), 10).ids
        tensor([0, 1, 2, 3, 5, 6, 7, 8])

    References:
        Sun et al. 2024, Massive activations in large language models.
    """
    if max_norm is None or batch.n < MIN_ROWS:
        return batch
    table = torch.stack(row_lengths(*batch.rows.values()))
    median = table.nanmedian(1, keepdim=True).values
    # A layer that is silent for most samples has no typical length.
    outlying = ((table > max_norm * median) & (median > 0) & table.isfinite()).any(0)
    if not bool(outlying.any()):
        return batch
    return batch.select((~outlying).nonzero()[:, 0])


def row_lengths(*layers: Tensor) -> list[Tensor]:
    """Return the length of each row of some layers, on one device, float64."""
    layers = tuple(x if x.is_floating_point() else x.abs().float() for x in layers)
    wide = [torch.float64 if x.dtype == torch.float64 else torch.float32 for x in layers]
    lengths = [torch.linalg.vector_norm(x, dim=-1, dtype=kind).double() for x, kind in zip(layers, wide, strict=True)]
    # Asked of all layers at once: a GPU would stop for each answer.
    if bool(torch.stack([x.isinf().any() for x in lengths]).any()):
        # Squares leave float32 long before values do.
        lengths = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in layers]
    return lengths
