"""Scores of layers and layer pairs, with their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdprobe.errors import ConfigError, unknown
from tdprobe.tables import export, score_json, summary
from tdprobe.tables.block import ScoreBlock, ScoreCube, ScoreRow

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure


class ScoreTable:
    """Hold scores as long rows, one per layer or layer pair, with matrix, cube and export views.

    Args:
        blocks: Scores, one block for each estimator and pair of checkpoints.
        meta: What was run: models, data, options, versions. Must fit into JSON.

    Raises:
        ConfigError: Two blocks have the same estimator and checkpoints, or ``meta`` does not fit into JSON.

    Example:
        >>> block = ScoreBlock("cka", "base", "base", ("0", "1"), ("0", "1"), [[1.0, 0.5], [0.5, 1.0]], n=64)
        >>> table = ScoreTable([block], meta={"data": "corpus.txt"})
        >>> len(table), table.rows()[1].score
        (4, 0.5)
    """

    def __init__(self, blocks: Iterable[ScoreBlock], meta: Mapping[str, Any] | None = None) -> None:
        self.blocks = tuple(blocks)
        self.meta = score_json.as_json_value(dict(meta or {}), "meta")
        seen = set()
        for block in self.blocks:
            if block.key in seen:
                raise ConfigError(f"the table has the scores of {block.title} twice; pass each pair once.")
            seen.add(block.key)

    def __iter__(self) -> Iterator[ScoreRow]:
        for block in self.blocks:
            yield from block.rows()

    def __len__(self) -> int:
        return sum(block.values.size for block in self.blocks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScoreTable):
            return NotImplemented
        return self.blocks == other.blocks and self.meta == other.meta

    __hash__ = None

    def __repr__(self) -> str:
        return summary.as_text(self)

    def _repr_html_(self) -> str:
        return summary.as_html(self)

    def rows(self) -> list[ScoreRow]:
        """Return every score as a named tuple."""
        return list(self)

    @property
    def estimators(self) -> tuple[str, ...]:
        """Names of the estimators, in order of appearance."""
        return tuple(dict.fromkeys(block.estimator for block in self.blocks))

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of the checkpoints, in order of appearance."""
        return tuple(dict.fromkeys(name for block in self.blocks for name, _ in block.sides if name))

    def layers(self, checkpoint: str | None = None) -> tuple[str, ...]:
        """Return the layer names of one checkpoint, or of all, in depth order.

        Raises:
            ConfigError: There is no such checkpoint.
        """
        self._check("checkpoint", checkpoint, self.checkpoints)
        sides = [block.sides[0] for block in self.blocks] + [side for block in self.blocks for side in block.sides[1:]]
        found = (name for owner, names in sides if checkpoint in (None, owner) for name in names)
        return tuple(dict.fromkeys(found))

    def select(
        self, estimator: str | None = None, checkpoint_a: str | None = None, checkpoint_b: str | None = None
    ) -> ScoreTable:
        """Return the table of the blocks with these names; None takes all.

        ``checkpoint_b`` may also be the key that the targets of a supervised estimator came under.

        Raises:
            ConfigError: A name does not occur in the table.
        """
        wanted = (estimator, checkpoint_a, checkpoint_b)
        self._check("estimator", estimator, self.estimators)
        self._check("checkpoint", checkpoint_a, self.checkpoints)
        keys = (block.checkpoint_b for block in self.blocks if block.columns == "targets")
        self._check("checkpoint", checkpoint_b, tuple(dict.fromkeys((*self.checkpoints, *keys))))
        kept = [b for b in self.blocks if all(w in (None, k) for w, k in zip(wanted, b.key, strict=True))]
        return ScoreTable(kept, self.meta)

    def block(
        self, estimator: str | None = None, checkpoint_a: str | None = None, checkpoint_b: str | None = None
    ) -> ScoreBlock:
        """Return the one block with these names, turned round if only the other order is stored.

        Raises:
            ConfigError: No block, or more than one, has these names.
        """
        found = self.select(estimator, checkpoint_a, checkpoint_b).blocks
        if not found:
            other = self.select(estimator, checkpoint_b, checkpoint_a).blocks
            found = tuple(block.flipped() for block in other if block.symmetric)
        if len(found) == 1:
            return found[0]
        asked = f"estimator={estimator!r}, checkpoint_a={checkpoint_a!r}, checkpoint_b={checkpoint_b!r}"
        have = "; ".join(block.title for block in (found or self.blocks)[:12]) or "nothing"
        trouble = f"{len(found)} sets of scores fit" if found else "no scores for"
        raise ConfigError(f"{trouble} {asked}; name one of: {have}.")

    def matrix(
        self, estimator: str | None = None, checkpoint_a: str | None = None, checkpoint_b: str | None = None
    ) -> np.ndarray:
        """Return the scores between the layers of two checkpoints.

        Args:
            estimator: May be left out where one estimator fits the rest.
            checkpoint_a: Checkpoint of the rows; may be left out where it is unambiguous.
            checkpoint_b: Checkpoint of the columns; may be left out where it is unambiguous.

        Returns:
            Float64, (La, Lb), or (La,) for a layer estimator.

        Raises:
            ConfigError: A name is unknown, or the names fit no block or more than one.
        """
        return self.block(estimator, checkpoint_a, checkpoint_b).values.copy()

    def significant(self, alpha: float = 0.05) -> ScoreTable:
        """Return the table with NaN for the scores that unrelated rows reach too.

        Args:
            alpha: Share of permutations that may score at least as similar; scores are kept up to this p, each by
                itself, without a correction for their number.

        Raises:
            ConfigError: The scores have no null, or too few permutations for this ``alpha``.
        """
        if not 0 < alpha < 1:
            raise ConfigError(f"alpha is a share between 0 and 1, such as 0.05; got {alpha!r}")
        tested = [(block, block.p) for block in self.blocks if block.p is not None]
        if not tested:
            raise ConfigError("these scores have no null to compare with; score pairs of layers with null=99, or more")
        least = 1 / (1 + self.meta.get("permutations", 10**9))
        if least > alpha:
            needed = math.ceil(1 / alpha) - 1
            raise ConfigError(
                f"{self.meta['permutations']} permutations give no p below {least:.3g}; for alpha={alpha:g} score with "
                f"null={needed}, or more"
            )
        return ScoreTable([block.only(p <= alpha) for block, p in tested], {**self.meta, "alpha": alpha})

    def cube(self, estimator: str | None = None) -> ScoreCube:
        """Return all scores of one estimator on common checkpoint and layer axes.

        The scores of a symmetric estimator stored for (a, b) also fill (b, a).

        Raises:
            ConfigError: The estimator is unknown, or left out while there are several.
        """
        return export.cube(self, estimator)

    def to_pandas(self) -> pd.DataFrame:
        """Return the long rows as a data frame (extra ``tables``)."""
        return export.to_pandas(self)

    def to_xarray(self) -> xr.Dataset:
        """Return one cube per estimator on shared coordinates (extra ``tables``)."""
        return export.to_xarray(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the table as strict JSON text; with ``path``, write it there whole or not at all.

        Raises:
            ConfigError: The path cannot be written.
        """
        return score_json.dump(self, path)

    @classmethod
    def from_json(cls, path_or_text: str | Path) -> ScoreTable:
        """Read what ``to_json`` wrote, from a path or from the text itself.

        Raises:
            ConfigError: The file is missing, is not JSON, or is not a table that this version reads.
        """
        meta, blocks = score_json.load(path_or_text)
        return cls([ScoreBlock(**block) for block in blocks], meta)

    def plot(
        self,
        estimator: str | None = None,
        checkpoint_a: str | None = None,
        checkpoint_b: str | None = None,
        **options: Any,
    ) -> Figure:
        """Draw heat maps of layer pairs, or curves over depth of single layers, one for each target (extra ``plot``).

        ``options`` go to ``tdprobe.viz.plot_table``, such as ``ax=`` and ``title=``.
        """
        from tdprobe.viz import plot_table

        return plot_table(self, estimator, checkpoint_a, checkpoint_b, **options)

    def report(self, path: str | Path) -> Path:
        """Write one interactive HTML file that works offline (extra ``report``); return its path."""
        from tdprobe.viz import write_report

        return write_report(self, path)

    def _check(self, kind: str, name: str | None, names: tuple[str, ...]) -> None:
        if name is not None and name not in names:
            raise ConfigError(unknown(kind, name, names))


__all__ = ["ScoreBlock", "ScoreCube", "ScoreRow", "ScoreTable"]
