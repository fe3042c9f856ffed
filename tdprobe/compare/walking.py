"""Walk checkpoints over batches, unit by unit, alone or with other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm.auto import tqdm

from tdprobe import __version__, hf
from tdprobe.compare.checkpoints import Checkpoint
from tdprobe.compare.parts import Part
from tdprobe.compare.reading import Reading
from tdprobe.compare.sharing import Batches, Sharing
from tdprobe.compare.units import Units
from tdprobe.modules import HookedModule


class Keeper(Protocol):
    """Keep what rows leave behind, with one unit of work open."""

    def take(self) -> Part:
        """End the open unit and return it."""

    def add(self, part: Part) -> None:
        """Keep a unit that was taken, or several merged."""


@dataclass
class Walking:
    """Say how batches are walked, and what is known of the checkpoints that walked over them.

    Args:
        reading: What the rows of a checkpoint are.
        sharing: The processes and the parts that they leave; ``None`` for a single process that keeps none.
        unit: Batches of a unit, or ``None``.
        portion: Rows of an update.
        progress: Whether to show a bar.
        about: What a table says of each checkpoint, by its name.
        runs: How many runs there were.
    """

    reading: Reading
    sharing: Sharing | None
    unit: int | None
    portion: int
    progress: bool
    about: dict[str, Any] = field(default_factory=dict)
    runs: int = 0

    def enter(self, stack: ExitStack, checkpoint: Checkpoint) -> tuple[hf.LoadedModel, HookedModule]:
        """Load and hook a checkpoint until the stack ends."""
        loaded = stack.enter_context(checkpoint.loaded())
        factory = self.reading.factory(checkpoint, loaded)
        about = hf.describe(loaded.model, loaded.tokenizer, revision=loaded.revision)
        self.about[checkpoint.name] = {**about, "layers": factory.key_pattern}
        hooked = stack.enter_context(factory.prepare(loaded.model))

        def allow_idle() -> None:
            # A process with no unit of its own, or with finished ones only, runs no layer, and that is fine.
            factory.required = hooked.hooking_context.calls > 0

        stack.callback(allow_idle)
        return loaded, hooked

    def run(
        self,
        batches: Any,
        streams: Mapping[str, Any],
        read: Callable[[int, tuple[Any, ...]], Any],
        keeper: Keeper,
        config: Mapping[str, Any],
        place: str = "",
    ) -> None:
        """Read every unit, or those of this process, and keep what they bring, or what all have brought.

        Args:
            batches: What is compared on.
            streams: What each checkpoint makes of it, by its name.
            read: Called with number and inputs of each batch; gives the rows to the keeper.
            keeper: Keeps them.
            config: What they depend on besides batches, tokens and models.
            place: Subfolder for parts.
        """
        size = self.reading.unit_size(self.unit, batches, self.portion)
        units = Units(list(streams.values()), size)
        # Together, no single name would be right.
        title = next(iter(streams)) if place else None
        with tqdm(unit="batch", desc=title, disable=not self.progress) as bar:

            def work(items: Batches) -> None:
                for number, inputs in items:
                    # Batches of another run are other batches.
                    read((self.runs << 32) + number, inputs)
                    bar.update()

            def taken(items: Batches) -> Part:
                work(items)
                return keeper.take()

            if self.sharing is not None:
                config = {**self._config(batches, list(streams), size), **config}
                keeper.add(self.sharing.run(self._place(place), config, units, taken, bar.reset))
                return
            bar.reset(units.n_batches(lambda unit: True))
            for unit, items in units.walk(lambda unit: True):
                # The first unit goes on with what an earlier run left open.
                if unit:
                    keeper.add(keeper.take())
                work(items)

    def _config(self, batches: Any, names: Sequence[str], size: int) -> dict[str, Any]:
        """Say what the rows of a run depend on, which is neither the number of processes nor the device."""
        about = {name: self.about[name] for name in names}
        data = self.reading.data(batches)
        return {"tdprobe": __version__, "data": data, "unit": size, **self.reading.selection, "checkpoints": about}

    def _place(self, place: str) -> str:
        return f"run-{self.runs}/{place}".rstrip("/") if self.runs > 1 else place
