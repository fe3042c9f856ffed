"""The state of patching: which run is on, what the clean run gave, which tokens go where."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tdprobe.contexts import Site
from tdprobe.errors import ConfigError, StateError
from tdprobe.hooks.gate import in_backward
from tdprobe.latent.path_sites import PathContext
from tdprobe.stream.call import Call
from tdprobe.stream.rows import token_rows
from tdprobe.stream.tokens import Selection

Mode = Literal["off", "clean", "patched"]
Pair = tuple[Selection, Selection]
REMEMBERED_EDITS = 16


@dataclass(frozen=True)
class Stored:
    """One value of the clean run.

    Attributes:
        value: What the module gave.
        call: The forward pass that it comes from.
        into: The forward pass that it was patched into, once it was.
    """

    value: Tensor
    call: Call | None
    into: Call | None = None


class PatchingContext(PathContext):
    """Store the clean run, and hand its values to the run that is patched, occurrence by occurrence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mode: Mode = "off"
        self.clean: dict[str, list[Stored]] = {}
        self.restored: dict[str, Tensor] = {}
        # In a sweep: what is patched where, (clean, recipient); other modules are left alone.
        self.pairs: Mapping[str, Pair] | None = None
        self._turn: dict[str, int] = {}
        # Whether a backward pass may follow: asked where the model is called, because inside, checkpointing may turn
        # gradients off.
        self._may_repeat = True
        self._rerun: Callable[[], Any] | None = None
        self._edits: dict[str, deque[tuple[Tensor, Stored]]] = {}

    def forget(self) -> None:
        """Let go of the clean run; activations of a whole model are large."""
        self.clean, self.restored, self._rerun = {}, {}, None

    def _leave(self, error: BaseException | None = None) -> None:
        super()._leave(error)
        self._edits = {}

    def _begin(self, call: Call) -> None:
        if not in_backward():
            self._turn, self._may_repeat = {}, torch.is_grad_enabled()

    def run_clean(self, run: Callable[[], Any], *, whole: bool) -> Any:
        """Store what the modules give in ``run``.

        Args:
            run: Calls the model.
            whole: Whether the output is wanted; otherwise the pass ends once every module has run.
        """
        self.clean, self._rerun = {}, None if whole else run
        self.ends_early = not whole
        try:
            with self._in_mode("clean"):
                return run()
        finally:
            self.ends_early = False

    @contextmanager
    def patching(self) -> Generator[None]:
        """Patch every forward pass in the block.

        Raises:
            StateError: At the end, if a module ran in the clean run only.
        """
        before = {site.name: site.n_fired for site in self.sites}
        self.restored = {}
        with self._in_mode("patched"):
            yield
        wanted = self.clean if self.pairs is None else self.pairs
        for site in self.sites:
            if self.factory.required and site.name in wanted and site.n_fired == before[site.name]:
                raise StateError(
                    f"{site.name!r} ran {len(self.clean[site.name])} times in the clean run, and nothing was patched "
                    "there in the other one, because it did not run; required=False allows that"
                )

    @contextmanager
    def _in_mode(self, mode: Mode) -> Generator[None]:
        previous, turn = self.mode, self._turn
        self.mode, self._turn, self._may_repeat = mode, {}, torch.is_grad_enabled()
        try:
            yield
        finally:
            self.mode, self._turn = previous, turn

    def store(self, site: Site, value: Tensor) -> None:
        """Keep one value of the clean run."""
        self.clean.setdefault(site.name, []).append(Stored(value, self.tracker.call))
        self.seen(site)

    def next_stored(self, site: Site) -> Stored | None:
        """Return the clean value for this occurrence of a module, or None where nothing is to be patched."""
        call = self.tracker.call
        steps = call is not None and call.phase == "generated"
        if self.mode != "patched" or steps or (self.pairs is not None and site.name not in self.pairs):
            return None
        turn = self._turn.get(site.name, 0)
        self._turn[site.name] = turn + 1
        if turn >= len(self.clean.get(site.name, [])) and self._rerun is not None:
            self._store_the_rest()
        found = self.clean.get(site.name, [])
        if turn >= len(found):
            raise StateError(
                f"{site.name!r} runs for the {turn + 1}. time in the patched run and ran {len(found)} times in the "
                "clean one, so there is nothing to patch"
            )
        stored = found[turn]
        return Stored(stored.value, stored.call, call)

    def _store_the_rest(self) -> None:
        # The clean run ended once every module had run, and this one runs more often than that.
        call, pending = self.tracker.call, self._pending
        run, self._rerun = self._rerun, None
        if run is not None:
            self.run_clean(run, whole=True)
        self.tracker.call, self._pending = call, pending

    def pair_at(self, site: Site, stored: Stored) -> Pair | None:
        """Return the selected tokens of the clean value and of the recipient, or None for whole values."""
        if self.pairs is not None:
            return self.pairs[site.name]
        if self.clause is None:
            return None
        if stored.call is None or stored.into is None:
            raise StateError(
                "tokens are selected by the inputs of the prepared model, and a module of it was called on its own; "
                "prepare that module instead, or drop tokens="
            )
        return self.clause.select(stored.call), self.clause.select(stored.into)

    # Gradient checkpointing computes a pass again, when no run is on any more.

    def remember(self, site: Site, value: Tensor, stored: Stored) -> None:
        """Note an edit, so that a backward pass that repeats it can be recognised by the value that comes in."""
        if self._may_repeat and not value.is_inference():
            edits = self._edits.setdefault(site.name, deque(maxlen=REMEMBERED_EDITS))
            edits.append((_fingerprint(value), stored))

    def repeated(self, site: Site, value: Tensor) -> Stored | None:
        """Return what was patched into the pass that is repeated, or None if it was the clean one."""
        mark = _fingerprint(value)
        for known, stored in self._edits.get(site.name, ()):
            if torch.equal(known, mark):
                return stored
        return None


def _fingerprint(value: Tensor) -> Tensor:
    wide = value.detach().double()
    return torch.stack([wide.sum(), wide.square().sum()])


def refuse_other_padding(site: Site, clean: Call | None, call: Call | None) -> None:
    """Refuse to replace whole values of rows whose pads are elsewhere: tokens would land on other tokens."""
    masks = [each.mask for each in (clean, call) if each is not None and isinstance(each.mask, Tensor)]
    if len(masks) < 2 or masks[0].shape != masks[1].shape:
        return
    if not torch.equal(masks[0].bool(), masks[1].bool()):
        raise ConfigError(
            f"the clean and the other input have pads at different places, so the value of {site.name!r} cannot be "
            "replaced as a whole; tokens='all' pairs the real tokens, tokens='last' the ends of the rows"
        )


def check_pair(pair: Pair) -> None:
    """Refuse a pairing of tokens that does not come out even.

    Raises:
        ConfigError: A row of the batch has other numbers of selected tokens on the two sides.
    """
    theirs, mine = pair
    if theirs.n == mine.n and torch.equal(theirs.sample, mine.sample):
        return
    rows = max(theirs.shape[0], mine.shape[0])
    counts = [torch.bincount(side.sample, minlength=rows).tolist() for side in pair]
    row = next(i for i in range(rows) if counts[0][i] != counts[1][i])
    raise ConfigError(
        f"the clause selects {counts[0][row]} tokens of row {row} of the clean input and {counts[1][row]} of the "
        "other one; both must have as many, so choose tokens that both have, such as tokens='last'"
    )


def paired_rows(site: Site, value: Tensor, stored: Stored, pair: Pair) -> tuple[Tensor, Tensor]:
    """Take the selected rows of the recipient and those of the clean value that go there.

    Returns:
        Two (n, width) tensors, row by row in pairs.
    """
    check_pair(pair)
    return token_rows(site.name, value, pair[1]), token_rows(site.name, stored.value, pair[0])
