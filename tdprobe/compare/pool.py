"""Rows of all checkpoints side by side, scored unit by unit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tdprobe.compare.parts import Part
from tdprobe.errors import ConfigError
from tdprobe.latent.scorer import Scorer
from tdprobe.stream.batch import Batch
from tdprobe.stream.outliers import MIN_ROWS


class Pool:
    """Collect rows in units that never share a portion, so that any process can do any of them.

    Args:
        make: Makes an empty scorer.
    """

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self._make = make
        self._done = Part()
        self._begin()

    def _begin(self) -> None:
        self._scorer = self._make()
        self._widths: dict[str, int] = {}
        self._left_out = 0

    def push(self, batch: Batch, left_out: int) -> None:
        """Add the rows of one batch to the unit that is open.

        Args:
            batch: Rows of all layers.
            left_out: Rows of it that not every checkpoint has.

        Raises:
            ConfigError: A layer did not run, or gave rows of another width.
        """
        self._scorer.push(batch)
        self._widths = {name: rows.shape[-1] for name, rows in batch.rows.items()} if batch.n else self._widths
        self._left_out += left_out

    @property
    def n(self) -> int:
        """Rows so far."""
        return self._done.counts.get("rows", 0) + self._scorer.n

    @property
    def left_out(self) -> int:
        """Rows so far that not every checkpoint has."""
        return self._done.counts.get("left_out", 0) + self._left_out

    def close(self) -> None:
        """End the unit that is open, and keep it."""
        self.add(self.take())

    def take(self) -> Part:
        """End the unit that is open, and return it instead of keeping it."""
        part = self._part()
        self._begin()
        return part

    def add(self, part: Part) -> None:
        """Keep a unit that was taken, or several merged."""
        self._done = self._done.merge(part)

    def scorer(self) -> Scorer:
        """Return a scorer over every row so far.

        Raises:
            ConfigError: No unit has rows enough.
        """
        if not self._done.counts:
            return self._scorer
        part = self._done.merge(self._part())
        if part.counts["rows"] and not part.states:
            raise ConfigError(
                f"got {part.counts['rows']} rows, and fewer than {MIN_ROWS} in each unit of work; give more texts, or "
                "units of more batches"
            )
        scorer = self._make()
        if part.states:
            layers = {name: torch.zeros(0, width, device="cpu") for name, width in part.widths.items()}
            batch = Batch(layers, torch.zeros(0, dtype=torch.int64, device="cpu"))
            scorer.resume(batch, part.states, part.counts["rows"], part.counts["outliers"])
        return scorer

    def _part(self) -> Part:
        scorer = self._scorer
        counts = {"rows": scorer.n, "outliers": scorer.n_dropped, "left_out": self._left_out}
        if scorer.n < MIN_ROWS:
            # Too few to be worth an update of their own.
            return Part(self._widths, {**counts, "outliers": scorer.n})
        return Part(self._widths, counts, tuple(held.parts for held in scorer.kept().values()))
