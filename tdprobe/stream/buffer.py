"""Rows of many forward passes, handed on in equal portions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tdprobe.errors import ConfigError
from tdprobe.stream.batch import Batch


class RowBuffer:
    """Collect rows until there are enough to be worth an update.

    A portion is handed on only while ``reserve`` rows stay behind, so that what is left at the end is never too
    small for an estimator of its own.

    Args:
        portion: Rows per update.
        reserve: Rows that stay behind.
    """

    def __init__(self, portion: int, reserve: int = 8) -> None:
        self.portion = portion
        self.reserve = reserve
        self._parts: list[Batch] = []
        self.n = 0

    def push(self, batch: Batch) -> None:
        """Add the rows of one forward pass.

        Raises:
            ConfigError: Its layers or widths differ from those before.
        """
        if self._parts:
            require_same_layers(self._parts[0], batch)
        self._parts.append(batch)
        self.n += batch.n

    def portions(self) -> Iterator[Batch]:
        """Hand on as many full portions as there are."""
        while self.n >= self.portion + self.reserve:
            whole = self.rest()
            cut = self.portion
            yield whole.select(slice(cut))
            # Dropped only when the consumer comes back: an interrupted update must not lose rows.
            self._parts = [whole.select(slice(cut, None))]
            self.n = whole.n - cut

    def clear(self) -> None:
        """Forget what has not been handed on, but not which layers there are."""
        self._parts = [self.rest().select(torch.zeros(0, dtype=torch.long, device="cpu"))]
        self.n = 0

    def rest(self) -> Batch:
        """Return what has not been handed on, and keep it."""
        if len(self._parts) > 1:
            self._parts = [Batch.joined(self._parts)]
        return self._parts[0]


def require_same_layers(known: Batch, new: Batch) -> None:
    """Refuse rows that cannot go on where those of an earlier batch ended.

    Raises:
        ConfigError: A layer did not run, or ran for the first time, or has another width.
    """
    gone, more = set(known.rows) - set(new.rows), set(new.rows) - set(known.rows)
    if gone or more:
        what = f"{sorted(gone)[0]!r} did not run" if gone else f"{sorted(more)[0]!r} ran for the first time"
        raise ConfigError(f"layers must run in every forward pass to be scored together; this time {what}")
    for name, rows in new.rows.items():
        if rows.shape[-1] != known.rows[name].shape[-1]:
            raise ConfigError(
                f"layer {name!r} gave rows of width {rows.shape[-1]} after {known.rows[name].shape[-1]}; a selection "
                "that keeps the token axis apart (tokens=...) makes widths independent of the text length"
            )
