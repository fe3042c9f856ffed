"""Share units of work among processes, keep what is finished, and bring it together in one order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tdprobe.compare.parts import Part, PartFolder, pack, unpack
from tdprobe.compare.ranks import Ranks
from tdprobe.compare.units import Units
from tdprobe.errors import RankError

Batches = Iterator[tuple[int, tuple[Any, ...]]]


class Sharing:
    """Run the units of a comparison, each in one process, once.

    Args:
        ranks: The processes.
        folder: Where finished units are kept, so that the same run goes on after a failure; by default a temporary
            folder, which goes with the process.
    """

    def __init__(self, ranks: Ranks, folder: str | Path | None = None) -> None:
        self.ranks = ranks
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="tdprobe-", ignore_cleanup_errors=True)
            folder = self._temporary.name
        self._folder = Path(folder)
        self._used: list[PartFolder] = []

    def run(
        self,
        place: str,
        config: Mapping[str, Any],
        units: Units,
        work: Callable[[Batches], Part],
        expect: Callable[[int | None], Any] = lambda batches: None,
    ) -> Part:
        """Do the units of this rank that are not there yet, and merge the parts of all on rank 0.

        Args:
            place: Subfolder for the parts; empty for the folder itself.
            config: What the parts depend on.
            units: The units; the same on every rank.
            work: Turns the batches of a unit into its part.
            expect: Is told how many batches are to come, where that is known.

        Returns:
            The parts of all units, merged in their order, on rank 0; an empty one elsewhere.

        Raises:
            ConfigError: The ranks disagree, or the folder has the parts of another run.
            RankError: Another rank has ended or is silent, or this one is told to end.
        """
        folder = PartFolder(self._folder / place, config)
        self._used.append(folder)
        wanted = cache(lambda unit: self.ranks.owns(unit) and not folder.has(unit))
        with self._saying_what_is_kept():
            self.ranks.agree(folder.config)
            expect(units.n_batches(wanted))
            for unit, batches in units.walk(wanted):
                folder.write(unit, work(batches))
            self.ranks.agree({"units": len(units)})
            return self._gathered(folder, len(units))

    @contextmanager
    def _saying_what_is_kept(self) -> Generator[None]:
        try:
            yield
        except RankError as error:
            raise RankError(f"{error}; {self.kept()}") from error

    def _gathered(self, folder: PartFolder, count: int) -> Part:
        """Bring the parts to rank 0, one after the other, so that never more than one is on its way."""
        ranks, total = self.ranks, Part()
        if not ranks.first:
            for unit in filter(ranks.owns, range(count)):
                ranks.send(pack(folder.read(unit), unit))
            return total
        for unit in range(count):
            other = unit % ranks.world
            part = unpack(ranks.receive(other), unit, f"what rank {other} sent") if other else folder.read(unit)
            total = total.merge(part)
        return total

    def kept(self) -> str:
        """Say what becomes of finished units."""
        if self._temporary is not None:
            return "nothing is kept: give a folder for parts to be able to go on"
        return f"finished units are in {str(self._folder)!r}: the same run goes on from there"

    def finish(self) -> None:
        """Delete the parts, once rank 0 has said that their results are safe; every rank calls it."""
        with self._saying_what_is_kept():
            self.ranks.shared(b"done")
        for folder in self._used:
            folder.remove(self._folder)
        self._used = []
        if self._temporary is not None:
            self._temporary.cleanup()
