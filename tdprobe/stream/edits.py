"""From rows of selected tokens back into a layer's value."""

from __future__ import annotations

from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.stream.rows import token_rows
from tdprobe.stream.tokens import Selection


def write_rows(name: str, value: Tensor, selection: Selection, rows: Tensor) -> Tensor:
    """Put rows where :func:`~tdprobe.stream.rows.token_rows` takes them from.

    Args:
        name: The layer, for the message.
        value: (batch, tokens, ...), (batch * tokens, ...), or, where each sample gives one row, (batch, ...).
        selection: What a clause chose in this call.
        rows: (n, width), in the order of the selection.

    Returns:
        A new tensor of the shape, dtype and device of ``value``; tokens that were not selected are as before.

    Raises:
        ConfigError: The rows have another shape than those that the selection takes.

    Example:
        >>> import torch
        >>> chosen = Selection((1, 3), torch.tensor([2]), None, torch.tensor([0]), torch.tensor([2]))
        >>> write_rows("layer", torch.zeros(1, 3, 1), chosen, torch.ones(1, 1)).flatten().tolist()
        [0.0, 0.0, 1.0]
    """
    batch, tokens = selection.shape
    per_token = value.ndim >= 3 and value.shape[:2] == (batch, tokens)
    per_token |= value.ndim >= 2 and value.shape[0] == batch * tokens and tokens > 1
    if not per_token:
        # A value without a token axis is refused where it does not have one row per sample.
        token_rows(name, value, selection)
    flat = value.reshape(batch * tokens if per_token else batch, -1)
    if rows.shape != (selection.n, flat.shape[1]):
        raise ConfigError(
            f"layer {name!r}: the new rows have shape {tuple(rows.shape)}, those of the selected tokens "
            f"{(selection.n, flat.shape[1])}; both must agree"
        )
    at = selection.index if per_token else selection.sample
    if at is None:
        return rows.to(value).reshape(value.shape)
    return flat.index_copy(0, at.to(value.device), rows.to(value)).reshape(value.shape)
