"""The states behind a set of estimators: one for each source, in groups of rows where that costs no more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.estimator import Estimator
from tdprobe.stats.hashing import mix64
from tdprobe.stats.routes import cheapest
from tdprobe.stats.state import State, Statistic
from tdprobe.stream.batch import Batch

# Bytes that groups of rows may take beyond a single state.
GROUP_BUDGET = 2**28


@dataclass(frozen=True)
class Source:
    """Say what an estimator reads; estimators with equal sources share one state.

    Args:
        statistic: What to keep.
        target_keys: Targets that it reads besides the layers.
    """

    statistic: Statistic
    target_keys: tuple[Any, ...] = ()

    def most_layers(self, widths: Sequence[int], budget: float) -> int:
        """Return how many layers of the larger widths a state may have within ``budget`` bytes, 2 at least.

        Each width may come twice: as it is, and shuffled.
        """
        wide = sorted([*widths, *widths], reverse=True)
        return next((m for m in range(len(wide), 2, -1) if self.statistic.nbytes(wide[:m]) <= budget), 2)


@dataclass(frozen=True)
class GroupedState:
    """Hold one state for each of several disjoint groups of rows; a value, like a state.

    Args:
        parts: The states; ``None`` where no row has come yet.
    """

    parts: tuple[State | None, ...]

    def updated(self, group: int, update: Callable[[State | None], State]) -> GroupedState:
        """Return the groups with one of them brought up to date."""
        place = group % len(self.parts)
        return GroupedState(tuple(update(part) if i == place else part for i, part in enumerate(self.parts)))

    @property
    def filled(self) -> list[State]:
        """The states of groups that have rows."""
        return [part for part in self.parts if part is not None]

    @property
    def sizes(self) -> list[int]:
        """Rows of each group that has any."""
        return [int(cast("Any", part).n) for part in self.filled]

    def total(self) -> State:
        """Merge all groups."""
        return reduce(lambda a, b: a.merge(b), self.filled)

    def without(self) -> Iterator[State]:
        """Merge all groups but one, for each of them; no more than a few states are there at a time."""
        yield from _without(self.filled, None)


def _without(parts: list[State], others: State | None) -> Iterator[State]:
    """Halve the groups: what is outside of a half is shared by all groups in it."""
    if len(parts) == 1:
        if others is not None:
            yield others
        return
    halves = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    for half, rest in (halves, halves[::-1]):
        outside = reduce(lambda a, b: a.merge(b), rest)
        yield from _without(half, outside if others is None else others.merge(outside))


def sources_of(estimators: Mapping[str, Estimator], batch: Batch, budget: float, whole: bool) -> dict[str, Source]:
    """Choose the route of each estimator, one for all where what the others need is among what one keeps.

    Args:
        estimators: By label.
        batch: Rows of all layers.
        budget: Bytes that a state may take.
        whole: The rows are all there are. Of several routes to one value the one with the least work is taken then; a
            stream does not know how long it will be.

    Raises:
        ConfigError: A state is larger than ``budget`` bytes, and there is no cheaper route.
    """
    own = {label: Source(item.statistic(), item.target_keys) for label, item in estimators.items()}
    asked = {label: reduce(_wider, own.values(), source) for label, source in own.items()}
    found = {}
    for label, item in estimators.items():
        alike = [estimators[other] for other, source in asked.items() if source == asked[label]]
        widths = [x.shape[-1] for x in item.inputs(batch)]
        source = with_least_work(asked[label], alike, widths, batch.n, budget) if whole else asked[label]
        found[label] = _within(budget, source, widths, item.spec.name)
    return found


def _wider(source: Source, other: Source) -> Source:
    """Return the other source if it keeps all that this one does: work that both need is done once then."""
    covers = other.target_keys == source.target_keys and other.statistic.covers(source.statistic)
    return other if covers else source


def with_least_work(
    source: Source, estimators: Sequence[Estimator], widths: Sequence[int], n: int, budget: float
) -> Source:
    """Return the cheapest source for n rows that are all at hand, from which all of some estimators score the same.

    Args:
        source: What they read so far.
        estimators: Those that read it.
        widths: Width of each layer.
        n: Rows.
        budget: Bytes that a state may take.
    """
    first, *others = [item.at_hand() for item in estimators]
    common = [route for route in first if all(route in routes for routes in others)]
    # What memory has made of a route, such as a sketch, gives another value.
    return replace(source, statistic=cheapest(common, widths, n, budget)) if source.statistic in common else source


def _within(budget: float, source: Source, widths: Sequence[int], name: str) -> Source:
    """Take something cheaper where a state takes too much memory."""
    asked = statistic = source.statistic
    while (size := statistic.nbytes(widths)) > budget:
        cheaper = statistic.cheaper()
        if cheaper is None:
            raise ConfigError(
                f"{name} by {statistic.route} would keep {size / 2**30:.3g} GiB for {len(widths)} "
                f"layers of up to {max(widths)} columns, and memory_budget is {budget / 2**30:.3g} GiB; score fewer "
                "layers, use a route with a smaller state (a bank of rows, or minibatches), or raise memory_budget"
            )
        statistic = cheaper
    if statistic is not asked:
        warnings.warn(
            f"{name} by {asked.route} would keep {asked.nbytes(widths) / 2**30:.3g} GiB, and "
            f"memory_budget is {budget / 2**30:.3g} GiB; it takes the route {statistic.route!r} instead",
            stacklevel=3,
        )
    return replace(source, statistic=statistic)


def empty_groups(source: Source, widths: Sequence[int], groups: int) -> GroupedState:
    """Return no rows, in as many groups as memory allows."""
    size = max(1, source.statistic.nbytes(widths))
    allowed = min(groups, GROUP_BUDGET // size)
    return GroupedState((None,) * (allowed if source.statistic.additive and allowed > 2 else 1))


def with_rows(states: Mapping[Source, GroupedState], batch: Batch) -> dict[Source, GroupedState]:
    """Return the states with the rows of a batch, which all go to one group."""
    device = batch.ids.device
    # By its rows, not by their place in the stream: any order and sharding makes the same groups.
    group = int(mix64(batch.ids[:1]) & (2**31 - 1)) if batch.n else 0
    found = dict(states)
    # The forward pass may run under autocast or inference mode; statistics must not.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for source, held in states.items():
            rows = [*batch.rows.values(), *(batch.targets[key] for key in source.target_keys)]
            found[source] = held.updated(group, _update(source.statistic, rows, batch.ids))
    return found


def _update(statistic: Statistic, rows: list[Tensor], ids: Tensor) -> Callable[[State | None], State]:
    return lambda state: statistic.update(statistic.init(rows, ids) if state is None else state, rows, ids)
