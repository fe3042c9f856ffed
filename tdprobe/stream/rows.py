"""From a layer's value to the rows of the selected tokens."""

from __future__ import annotations

from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.stream.tokens import Selection


def token_rows(name: str, value: Tensor, selection: Selection) -> Tensor:
    """Take the selected rows of one layer.

    Args:
        name: The layer, for the message.
        value: (batch, tokens, ...), (batch * tokens, ...), or, where each sample gives one row, (batch, ...).
        selection: What a clause chose in this call.

    Returns:
        (n, width).

    Raises:
        ConfigError: The value has no token axis.
    """
    batch, tokens = selection.shape
    if value.ndim >= 3 and value.shape[:2] == (batch, tokens):
        return selection.take(value)
    if value.ndim >= 2 and value.shape[0] == batch * tokens and tokens > 1:
        return selection.take(value.reshape(batch, tokens, -1))
    one_each = len(selection.sample.unique()) == selection.n
    if value.ndim >= 2 and value.shape[0] == batch and one_each:
        return value.reshape(batch, -1).index_select(0, selection.sample.to(value.device))
    raise ConfigError(
        f"layer {name!r} gives a value of shape {tuple(value.shape)}, which has no token axis for a batch of "
        f"{batch} x {tokens} tokens; choose one token per sample (tokens='last' or 'mean'), or leave this layer "
        "out of the pattern"
    )
