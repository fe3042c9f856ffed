"""Rows at another scale, before any statistic sees them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tdprobe.errors import ConfigError, unknown
from tdprobe.stream.batch import Batch
from tdprobe.stream.outliers import MIN_ROWS, check_max_norm, row_lengths, without_outliers

Rescale = Literal["clip", "unit", "standard"]


def check_rescale(rescale: Any, max_norm: float | None) -> None:
    """Refuse what is no way to rescale rows, and limits that would drop ordinary ones.

    Raises:
        ConfigError: An unknown name, ``"clip"`` without a length to clip to, or a ``max_norm`` that is no limit.
    """
    check_max_norm(max_norm)
    if rescale is not None and rescale not in get_args(Rescale):
        raise ConfigError(unknown("rescale", rescale, get_args(Rescale)))
    if rescale == "clip" and max_norm is None:
        raise ConfigError("rescale='clip' shortens rows to max_norm median lengths, and max_norm is None; set it, to 4")


def selected(batch: Batch, max_norm: float | None, rescale: Rescale | None) -> Batch:
    """Return the rows that statistics see.

    Args:
        batch: Rows of all layers, ``(n, d_layer)`` each, on one device.
        max_norm: Rows longer than this many median lengths are left out of all layers, or clipped.
        rescale: ``"clip"`` shortens those rows instead, in the layers where they are too long; ``"unit"`` brings every
            row to length 1; ``"standard"`` every row to mean 0 and variance 1 over its columns, as a layer norm
            without weights does. The last two look at one row only, so that a stream needs no statistics for them;
            their results are float32 at least. Rows of zeros, or of equal numbers, become zeros.

    Example:
        >>> import torch
        >>> selected(Batch({"layer": torch.tensor([[3.0, 4.0]])}, torch.arange(1)), None, "unit").rows["layer"]
        tensor([[0.6000, 0.8000]])

    References:
        Ba, Kiros, Hinton 2016, Layer normalization.
    """
    if rescale == "clip":
        long_enough = max_norm is not None and batch.n >= MIN_ROWS
        return _with_rows(batch, lambda x: _clipped(x, max_norm)) if long_enough else batch
    kept = without_outliers(batch, max_norm)
    return kept if rescale is None else _with_rows(kept, lambda x: _scaled(x, centre=rescale == "standard"))


def _with_rows(batch: Batch, change: Any) -> Batch:
    with torch.no_grad():
        return Batch({name: change(x) for name, x in batch.rows.items()}, batch.ids, batch.targets)


def _clipped(x: Tensor, max_norm: float) -> Tensor:
    (lengths,) = row_lengths(x)
    limit = max_norm * lengths.nanmedian()
    (long,) = ((lengths > limit) & (limit > 0) & lengths.isfinite()).nonzero().unbind(1)
    if len(long) == 0:
        return x
    shorter = x[long].double() * (limit / lengths[long]).unsqueeze(1)
    return x.index_copy(0, long, shorter.to(x.dtype))


def _scaled(x: Tensor, centre: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if centre:
        wide = wide - wide.mean(-1, keepdim=True)
        # The first mean is only as exact as an offset allows.
        wide = wide - wide.mean(-1, keepdim=True)
    # Squares may leave the dtype long before values do.
    most = wide.abs().amax(-1, keepdim=True)
    wide = wide / torch.where(most > 0, most, 1)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / torch.where(length > 0, length, 1) * (wide.shape[-1] ** 0.5 if centre else 1.0)
