"""The largest values of every unit, and the rows that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.errors import ConfigError
from tdprobe.stats.state import State, Statistic, by_layer, check_widths, layer_list, undisturbed, working_dtype


class TopKState(State):
    """Hold, for every unit, its largest values and the ids of their rows, largest first.

    Attributes:
        top: Layer index (``"0"``, ``"1"``, ...) -> ``(d, m)`` in the working dtype, m at most ``k``.
        ids: Layer index -> ``(d, m)`` int64. Of equal values the lower id comes first.
        n: Rows that went past, repeated ids included, int64.
        k: Most values to keep, int64.
    """

    top: TensorDict
    ids: TensorDict
    n: Tensor
    k: Tensor

    def merge(self, other: TopKState) -> TopKState:
        """Keep the largest of both, the same in any order and grouping; a row that both saw counts once."""
        if int(self.k) != int(other.k):
            raise ConfigError(
                f"cannot merge the {int(self.k)} and the {int(other.k)} largest values; use one k for both"
            )
        theirs = layer_list(other.top)
        check_widths([x.transpose(-2, -1) for x in theirs], [x.shape[:1] for x in layer_list(self.top)])
        return self._with(theirs, layer_list(other.ids), other.n)

    def _with(self, values: Sequence[Tensor], ids: Sequence[Tensor], seen: Tensor | int) -> TopKState:
        own = zip(layer_list(self.top), layer_list(self.ids), strict=True)
        both = [
            _largest(torch.cat([v, new_v.to(v.dtype)], 1), torch.cat([i, new_i], 1), int(self.k))
            for (v, i), new_v, new_i in zip(own, values, ids, strict=True)
        ]
        kept = by_layer(v for v, _ in both), by_layer(i for _, i in both)
        return TopKState(top=kept[0], ids=kept[1], n=self.n + seen, k=self.k)


@dataclass(frozen=True)
class TopK(Statistic):
    """Keep the ``k`` largest values of every unit of every layer, with the ids of the rows that gave them.

    Args:
        k: Most values per unit, 1 or more.

    Example:
        >>> x, ids = torch.tensor([[1.0], [5.0], [3.0]]), torch.tensor([10, 11, 12])
        >>> top = TopK(k=2)
        >>> state = top.update(top.init([x], ids), [x], ids)
        >>> state.top["0"].tolist(), state.ids["0"].tolist()
        ([[5.0, 3.0]], [[11, 12]])
    """

    name: ClassVar[str] = "topk"
    k: int = 10

    def __post_init__(self) -> None:
        """Refuse a number that keeps nothing."""
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ConfigError(f"got k={self.k!r}; allowed are integers from 1 on")

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> TopKState:
        """Return the state of no rows for the units of ``rows``, each (n, d)."""
        dtype, device = working_dtype(rows), ids.device
        if any(x.ndim != 2 for x in rows):
            raise ConfigError(f"rows are (n, d), got the shapes {[tuple(x.shape) for x in rows]}")
        return TopKState(
            top=by_layer(torch.empty(x.shape[1], 0, dtype=dtype, device=x.device) for x in rows),
            ids=by_layer(torch.empty(x.shape[1], 0, dtype=torch.int64, device=x.device) for x in rows),
            n=torch.zeros((), dtype=torch.int64, device=device),
            k=torch.tensor(self.k, device=device),
        )

    @undisturbed
    def update(self, state: TopKState, rows: Sequence[Tensor], ids: Int[Tensor, " n"]) -> TopKState:
        """Let in what is larger than the values so far."""
        check_widths(rows, [x.shape[:1] for x in layer_list(state.top)])
        return state._with([x.T for x in rows], [ids.to(x.device).expand(x.shape[1], -1) for x in rows], len(ids))


def _largest(values: Float[Tensor, "d n"], ids: Int[Tensor, "d n"], k: int) -> tuple[Tensor, Tensor]:
    """Sort each unit by value, equal values by id, and keep the first ``k`` different rows."""
    values, ids = _by_id(values, ids)
    if bool(_repeated(ids).any()):
        # Of a row that came twice the larger value counts; the other goes behind everything.
        values, ids = _by_id(*_by_value(values, ids))
        again = _repeated(ids)
        behind = values.argsort(dim=1, descending=True, stable=True)
        behind = behind.gather(1, again.gather(1, behind).sort(dim=1, stable=True).indices)
        # Every unit has seen the same rows, or holds k of them already.
        k = min(k, int((~again).sum(1).min()))
        return values.gather(1, behind[:, :k]), ids.gather(1, behind[:, :k])
    values, ids = _by_value(values, ids)
    return values[:, :k].clone(), ids[:, :k].clone()


def _by_id(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    ids, order = ids.sort(dim=1, stable=True)
    return values.gather(1, order), ids


def _by_value(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _repeated(ids: Tensor) -> Tensor:
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return again
