"""What is measured along each path of a stream, summed over paths: rows of a path come in order, in any batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Bool, Float, Int
from tdprobe.errors import ConfigError
from tdprobe.stats.state import State, Statistic, by_layer, check_widths, layer_list, undisturbed, working_dtype


class PathMeasure(ABC):
    """Measure how an attribute changes along a path; a hashable value, like a statistic."""

    # Fewest places of a path.
    least: ClassVar[int]

    @abstractmethod
    def __call__(self, x: Float[Tensor, "*b t"], y: Float[Tensor, "*b t"]) -> Float[Tensor, "*b"]:
        """Measure paths of one length, float64; NaN for a path that says nothing."""


class PathsState(State):
    """Hold the sums over paths that are over, and the rows of those that may go on.

    Attributes:
        n: Rows seen, int64.
        total: Sum over paths for each layer and attribute, ``(*lead, l, m)`` float64.
        squares: Sum of the squares, ``(*lead, l, m)`` float64.
        count: Number of the paths, ``(*lead, l, m)`` float64.
        odd: Rows of each layer that are not finite, ``(*lead, l)`` int64.
        origin: 0 for the p rows of this stream, whose paths may go on; other numbers for those of merged streams.
        number: Path of each of these rows, ``(p,)`` float64.
        at: Place of each of these rows in its stream, ``(p,)`` int64.
        rows: Layer index (``"0"``, ``"1"``, ...) -> the unit of each attribute, ``(*lead, p, m)``; the last one holds
            the attributes.
    """

    n: Tensor
    total: Tensor
    squares: Tensor
    count: Tensor
    odd: Tensor
    origin: Tensor
    number: Tensor
    at: Tensor
    rows: TensorDict

    def merge(self, other: PathsState) -> PathsState:
        """Add the sums of two streams over the same layers; each has whole paths, which end with it."""
        if self.total.shape != other.total.shape:
            raise ConfigError(
                f"cannot merge paths of {tuple(self.total.shape)} and {tuple(other.total.shape)} layers and "
                "attributes; both must come from the same layers, attributes and leading dimensions"
            )
        own = self.origin + 1
        theirs = other.origin + 1 + (own.max() if len(own) else 0)
        return self._with(other, torch.cat([own, theirs]))

    def _with(self, other: PathsState, origin: Int[Tensor, " p"]) -> PathsState:
        rows = zip(layer_list(self.rows), layer_list(other.rows), strict=True)
        return PathsState(
            n=self.n + other.n,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            count=self.count + other.count,
            odd=self.odd + other.odd,
            origin=origin,
            number=torch.cat([self.number, other.number]),
            at=torch.cat([self.at, other.at]),
            rows=by_layer(torch.cat(pair, -2) for pair in rows),
        )


@dataclass(frozen=True)
class Paths(Statistic):
    """Sum what is measured along each path, and keep the rows of a path until it is over.

    ``rows`` are those of the layers, then ``targets`` tensors of attributes, then the number of the path of each row,
    ``(*lead, n, 1)``, the same in all data sets. Rows of one path come in order; those of other paths may stand between
    them. A path is over when ``gap`` rows have come since its last one, or the stream has ended; what has its number
    afterwards is another path, whatever the batches were.

    Args:
        measure: What is measured, of the unit and the attribute.
        units: Unit of each attribute; ``None`` for 0, 1, ...
        targets: Tensors of attributes among the rows.
        gap: Rows without one of its own after which a path is over.
    """

    name: ClassVar[str] = "paths"
    # The rows of a path go to one state.
    additive: ClassVar[bool] = False
    measure: PathMeasure
    units: tuple[int, ...] | None = None
    targets: int = 1
    gap: int = 4096

    def __post_init__(self) -> None:
        """Refuse a gap that no second row can bridge."""
        if self.gap < 1:
            raise ConfigError(f"got gap={self.gap}; allowed are integers from 1 on, in rows")

    @property
    def route(self) -> str:
        """Say what is kept."""
        return "sums over paths"

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> PathsState:
        """Return zero sums for the layers of ``rows``.

        Raises:
            ConfigError: A layer has no unit for some attribute.
        """
        working_dtype(rows)
        none = [x[..., :0, :] for x in rows]
        return self._alone(none, self._picked(none), 0)

    @undisturbed
    def update(self, state: PathsState, rows: Sequence[Tensor], ids: Tensor) -> PathsState:
        """Add the rows to their paths, and the paths that are over to the sums.

        Raises:
            ConfigError: Attributes that are not finite, or paths that differ between data sets.
        """
        picked = self._picked(rows)
        check_widths(picked, [(*x.shape[:-2], x.shape[-1]) for x in layer_list(state.rows)])
        if rows[-1].numel() == 0:
            return state
        new = self._alone(rows, picked, int(state.n))
        both = state._with(new, torch.cat([state.origin, new.origin]))
        return self._closed(both, both.n - self.gap)

    def finished(self, state: PathsState) -> PathsState:
        """Return the state with every path over."""
        return self._closed(state, state.n)

    def _picked(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the units of the attributes in every layer, then the attributes."""
        layers, (*targets, _) = rows[: -self.targets - 1], rows[-self.targets - 1 :]
        a = torch.cat([y.detach() for y in targets], -1)
        units = tuple(range(a.shape[-1])) if self.units is None else self.units
        for index, x in enumerate(layers):
            if len(units) != a.shape[-1] or max(units, default=-1) >= x.shape[-1]:
                raise ConfigError(
                    f"layer {index} has {x.shape[-1]} units, and there are {a.shape[-1]} attributes with the units "
                    f"{list(units)}; needed is one unit of the layer for each attribute"
                )
        return [*(x.detach()[..., list(units)] for x in layers), a]

    def _alone(self, rows: Sequence[Tensor], picked: list[Tensor], seen: int) -> PathsState:
        """Return the state of some rows that begin somewhere in a stream, with no path over."""
        *_, a = picked
        bad = (~a.isfinite()).flatten(0, -2).sum(0).tolist()
        if any(bad):
            named = ", ".join(f"{count} values of attribute {i}" for i, count in enumerate(bad) if count)
            raise ConfigError(f"{named} are NaN or infinite; leave these samples or attributes out")
        layers = rows[: len(picked) - 1]
        odd = [(~x.isfinite()).any(-1).sum(-1) for x in layers]
        n, device = a.shape[-2], layers[0].device
        zeros = torch.zeros(*a.shape[:-2], len(layers), a.shape[-1], dtype=torch.float64, device=device)
        return PathsState(
            n=torch.tensor(n, device=device),
            total=zeros,
            squares=zeros,
            count=zeros,
            odd=torch.stack(odd, -1),
            origin=torch.zeros(n, dtype=torch.int64, device=device),
            number=_same_for_all(rows[-1]).to(device),
            at=torch.arange(seen, seen + n, device=device),
            rows=by_layer(x.to(device) for x in picked),
        )

    def _closed(self, state: PathsState, before: Tensor) -> PathsState:
        """Measure the paths of other streams, and those whose last row came before a place of this one."""
        if len(state.at) == 0:
            return state
        key = torch.stack([state.origin.double(), state.number])
        path = self._apart(key.unique(dim=1, return_inverse=True)[1], state.at)
        last = torch.zeros_like(path).scatter_reduce_(0, path, state.at, "amax", include_self=True)
        over = (state.origin > 0) | (last[path] < before)
        *layers, a = layer_list(state.rows)
        sums = torch.stack([state.total, state.squares, state.count])
        for place in _by_length(path, over, self.measure.least):
            y = _along(a, place)
            value = torch.stack([self.measure(_along(x, place), y) for x in layers], -3)
            known = ~value.isnan()
            value = value.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
            sums = sums + torch.stack([value, value.square(), known.double()]).sum(-2)
        left = (~over).nonzero().squeeze(-1)
        total, squares, count = sums
        return PathsState(
            n=state.n,
            total=total,
            squares=squares,
            count=count,
            odd=state.odd,
            origin=state.origin[left],
            number=state.number[left],
            at=state.at[left],
            rows=by_layer(x.index_select(-2, left) for x in (*layers, a)),
        )

    def _apart(self, path: Int[Tensor, " p"], at: Int[Tensor, " p"]) -> Int[Tensor, " p"]:
        """Number what has come since a gap as a path of its own: rows of one batch may lie that far apart too."""
        order = path.argsort(stable=True)
        new = (path[order].diff() != 0) | (at[order].diff() > self.gap)
        return torch.empty_like(path).scatter_(0, order, torch.nn.functional.pad(new.cumsum(0), (1, 0)))


def _same_for_all(number: Tensor) -> Float[Tensor, " n"]:
    if number.numel() == 0:
        return number.new_zeros(number.shape[-2], dtype=torch.float64)
    sets = number[..., 0].detach().reshape(-1, number.shape[-2]).double()
    # Written so that NaN is refused too.
    if number.shape[-1] != 1 or not bool((sets == sets[:1]).all()):
        raise ConfigError(
            "rows belong to different paths in different data sets, to several, or to NaN; give one number for each "
            "row, and score data sets one by one"
        )
    return sets[0]


def _by_length(path: Int[Tensor, " p"], over: Bool[Tensor, " p"], least: int) -> Iterator[Int[Tensor, "q t"]]:
    """Yield the places of the rows of all paths of one length that are over, length by length."""
    chosen = over.nonzero().squeeze(-1)
    order = chosen[path[chosen].argsort(stable=True)]
    lengths = path[order].unique_consecutive(return_counts=True)[1]
    first = lengths.cumsum(0) - lengths
    for t in lengths.unique().tolist():
        if t >= least:
            yield order[first[lengths == t].unsqueeze(-1) + torch.arange(t, device=path.device)]


def _along(x: Float[Tensor, "*lead p m"], place: Int[Tensor, "q t"]) -> Float[Tensor, "*lead q m t"]:
    return x.index_select(-2, place.flatten()).unflatten(-2, tuple(place.shape)).mT
