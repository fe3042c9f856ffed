"""Neighbours in every layer of a bank, found once for all estimators that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from tensordict import TensorClass, TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.stats.distances import Space
from tdprobe.stats.mean_ranks import mean_ranks
from tdprobe.stats.nearest import Wanted, find_nearest
from tdprobe.stats.partners import Partners, partners_of, settle_products
from tdprobe.stats.reservoir import ReservoirState
from tdprobe.stats.seen import Memory, Seen
from tdprobe.stats.state import Derivation, all_finite, by_layer, layer_list, working_dtype

# Measures that ranking in one more layer takes of each row after products in float32, where layers share little.
DOUBTS = 2


class NeighborTable(TensorClass):
    """Hold what `Neighbors` found in a bank of m rows, in l layers; NaN for layers that are not finite.

    Attributes:
        ids: Sample ids of the rows, ``(m,)`` int64.
        distances: Distance of each row to its neighbours of the ranks ``(*lead, l, m, q)`` float64.
        ranks: The ranks q, ``(q,)`` int64, 1 for the nearest.
        places: The nearest rows of each row, nearest first, ``(*lead, l, m, k)`` int64; -1 where there is none. Of
            rows that are equal the first stands for all.
        first: The first row that is equal to each row, itself in most cases, ``(*lead, l, m)`` int64.
        imbalance: ``(*lead, l, l)`` float64, from the layer of the row to that of the column; or
            ``(*lead, 0, 0)``.
        imbalance_se: Its standard error over rows, of the same shape.
        finite: Whether a layer holds finite numbers only, ``(*lead, l)`` bool.
        rows: The rows themselves, not copied: layer index -> ``(*lead, m, d)``; of length 1 for directions.
    """

    ids: Tensor
    distances: Tensor
    ranks: Tensor
    places: Tensor
    first: Tensor
    imbalance: Tensor
    imbalance_se: Tensor
    finite: Tensor
    rows: TensorDict

    @property
    def n(self) -> Tensor:
        """Count the rows, int64."""
        return torch.tensor(len(self.ids), device="cpu")

    @property
    def repeated(self) -> Tensor:
        """Tell whether an earlier row is equal, ``(*lead, l, m)`` bool."""
        return self.first != torch.arange(self.first.shape[-1], device=self.first.device)

    @property
    def duplicates(self) -> Tensor:
        """Count the rows that repeat an earlier one, ``(*lead, l)`` int64."""
        return self.repeated.sum(-1)

    def at(self, rank: int) -> Float[Tensor, "*lead l m"]:
        """Return the distances to the neighbours of one rank, infinite where there is none.

        Raises:
            ConfigError: The rank is not in the table.
        """
        (place,) = (self.ranks == rank).nonzero().unbind(1)
        if len(place) == 0:
            raise ConfigError(f"the table lacks rank {rank}; it holds {self.ranks.tolist()}")
        return self.distances[..., int(place)]


@dataclass(frozen=True)
class Neighbors(Derivation):
    """Say what to find out about the neighbours of the rows of a bank.

    Candidates come from products of centred rows, in float32 or, where many measures must be exact, in float64;
    whatever those cannot tell apart is decided by differences in float64, so near duplicates and offsets cost no
    digits. Memory is bounded by a block of rows, and a copy of the rows in the dtype of the products.

    Args:
        ranks: Neighbours whose distances are wanted, 1 for the nearest.
        imbalance: Find the information imbalance between all layers.
        p: Order of the norm.
        distinct: Count rows that are equal once, and none as its own copy's neighbour.
        beyond: Without ``distinct``: neighbours up to this distance do not count.
        places: How many of the nearest rows to list, with ``distinct`` only; their order is exact where ``ranks``
            hold all numbers up to this one.
        directions: Bring rows to length 1 first: their distances order rows as their cosines do.

    Raises:
        ConfigError: Places without ``distinct``.

    Example:
        >>> table = Neighbors((1, 2)).of_rows([torch.tensor([[0.0], [1.0], [3.0], [3.0]])])
        >>> table.distances[0].tolist(), int(table.duplicates)
        ([[1.0, 3.0], [1.0, 2.0], [2.0, 3.0], [2.0, 3.0]], 1)
    """

    ranks: tuple[int, ...] = ()
    imbalance: bool = False
    p: float = 2.0
    distinct: bool = True
    beyond: float = 0.0
    places: int = 0
    directions: bool = False

    def __post_init__(self) -> None:
        """Refuse what is not told apart."""
        if self.places and not self.distinct:
            raise ConfigError("got places without distinct=True; nearest rows are listed among distinct rows only")

    def joined(self, other: Any) -> Neighbors | None:
        """Return what serves both in one pass, or ``None`` where they count neighbours differently."""
        if not isinstance(other, Neighbors) or self._rule != other._rule:
            return None
        ranks, places = tuple(sorted({*self.ranks, *other.ranks})), max(self.places, other.places)
        return replace(self, ranks=ranks, imbalance=self.imbalance or other.imbalance, places=places)

    @property
    def _rule(self) -> tuple[float, bool, float, bool]:
        return self.p, self.distinct, self.beyond, self.directions

    def __call__(self, state: ReservoirState) -> NeighborTable:
        """Find the neighbours in the rows of a bank."""
        return self.of_rows(layer_list(state.rows), state.ids)

    def of_rows(self, rows: Sequence[Tensor], ids: Tensor | None = None) -> NeighborTable:
        """Find the neighbours in rows at hand.

        Args:
            rows: One tensor per layer, ``(*lead, m, d_layer)``.
            ids: Ids of the rows, by default 0, 1, ...
        """
        working_dtype(rows)
        device = rows[0].device
        # A stream keeps its ids on the CPU; a table is in one place.
        ids = torch.arange(rows[0].shape[-2], device=device) if ids is None else ids.to(device)
        # The caller's autograd, autocast and inference mode are the model's.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            rows = [_directed(x.detach()) if self.directions else x.detach() for x in rows]
            table = self._empty(rows, ids)
            for index in product(*map(range, rows[0].shape[:-2])):
                self._fill(table, index, [x[index] for x in rows])
        return table

    def _empty(self, rows: Sequence[Tensor], ids: Tensor) -> NeighborTable:
        lead, n, layers = rows[0].shape[:-2], rows[0].shape[-2], len(rows)
        squares = layers * self.imbalance

        def full(*shape: int) -> Tensor:
            return torch.full((*lead, *shape), torch.nan, dtype=torch.float64, device=rows[0].device)

        return NeighborTable(
            ids=ids,
            distances=full(layers, n, len(self.ranks)),
            ranks=torch.tensor(self.ranks, dtype=torch.int64, device="cpu"),
            places=torch.full((*lead, layers, n, self.places), -1, device=rows[0].device),
            first=torch.arange(n, device=rows[0].device).repeat(*lead, layers, 1),
            imbalance=full(squares, squares),
            imbalance_se=full(squares, squares),
            finite=torch.stack([all_finite(x) for x in rows], -1),
            rows=by_layer(rows),
        )

    def _fill(self, table: NeighborTable, index: tuple[int, ...], rows: Sequence[Tensor]) -> None:
        layers = [i for i, x in enumerate(rows) if len(x) and bool(table.finite[(*index, i)])]
        # Only imbalance looks at several layers at once; otherwise one is done before the next begins.
        for group in [layers] if self.imbalance else [[i] for i in layers]:
            asked = len(self.ranks) + (len(group) - 1) * DOUBTS
            spaces = {i: Space(rows[i], self.p, asked) for i in group}
            for i, space in spaces.items():
                table.first[(*index, i)] = space.first[space.own]
            if rows[0].shape[0] > 1 and group:
                _Pass(self, spaces).run(table, index)


def as_neighbors(state: ReservoirState | NeighborTable, wanted: Neighbors) -> NeighborTable:
    """Return a table as it is, and work it out from a bank."""
    return state if isinstance(state, NeighborTable) else wanted(state)


class _Pass:
    """Walk over the rows of one data set, a block of all layers at a time."""

    def __init__(self, config: Neighbors, spaces: dict[int, Space]) -> None:
        extra = {*config.ranks, *[1] * config.imbalance, *[config.places] * (config.places > 0)} or {1}
        self.config, self.spaces = config, spaces
        self.wanted = Wanted(
            tuple(sorted(extra)), config.distinct, config.beyond, ties=config.imbalance, places=config.places
        )
        self.kept = [self.wanted.ranks.index(rank) for rank in config.ranks]

    def run(self, table: NeighborTable, index: tuple[int, ...]) -> None:
        n, device = len(table.ids), table.distances.device
        sums = torch.zeros(2, len(self.spaces), len(self.spaces), dtype=torch.float64, device=device)
        memory = Memory(self.spaces, self.config.imbalance)
        for rows in torch.arange(n, device=device).split(memory.size):
            seen, partners = [], []
            for i, space in self.spaces.items():
                block = space.block(rows, out=memory.of(i, len(rows)))
                found = Seen.of(space, rows, block, self.wanted.few)
                nearest = find_nearest(found, self.wanted)
                table.distances[(*index, i)][rows] = space.distance(nearest.measures[:, self.kept])
                order = nearest.order
                table.places[(*index, i)][rows] = torch.where(order >= 0, space.first[order], -1)
                if self.config.imbalance:
                    seen.append(memory.keep(i, found))
                    partners.append(partners_of(space, rows, nearest))
            if self.config.imbalance:
                sums += _ranks(seen, partners)
                settle_products(self.spaces.values(), partners)
        if self.config.imbalance:
            held = torch.tensor(list(self.spaces), device=device)
            total, squares = 2 / n * sums
            table.imbalance[index][held.unsqueeze(1), held] = total / n
            # Rows as groups of their own: the spread of their ranks over sqrt(n).
            spread = (2 / n * squares - total.square() / n).clamp(min=0) / (n - 1)
            table.imbalance_se[index][held.unsqueeze(1), held] = (spread / n).sqrt()


def _ranks(seen: Sequence[Seen], partners: Sequence[Partners]) -> Tensor:
    """Sum, over some rows, the ranks (and squares) of the nearest rows of each layer in each other one."""
    count = len(partners)
    total = torch.empty(2, count, count, dtype=torch.float64, device=seen[0].rows.device)
    for place, layer in enumerate(seen):
        others = [other for other in range(count) if other != place]
        # In their own layer the nearest rows are tied for the first places.
        found = ((partners[place].counts + 1) / 2).double().unsqueeze(1)
        total[:, place, place] = torch.stack([found.sum(), found.square().sum()])
        if others:
            found = mean_ranks(layer, [partners[other] for other in others])
            total[:, others, place] = torch.stack([found.sum(0), found.square().sum(0)])
    return total


def _directed(x: Float[Tensor, "*lead m d"]) -> Float[Tensor, "*lead m d"]:
    """Bring rows to length 1; rows of zeros stay."""
    x = x.double()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)
