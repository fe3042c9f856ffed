"""Angles between successive steps from row to row, summed over texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdprobe._types import Bool, Float
from tdprobe.errors import ConfigError
from tdprobe.stats.state import State, Statistic, undisturbed, working_dtype


def turning_angles(
    x: Float[Tensor, "*b t d"], joined: Bool[Tensor, "*b u"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Sum the angles between successive steps, in radians.

    Angles keep the digits that arccos of a cosine loses near 0 and pi. Steps of length 0 have no direction.

    Args:
        x: Rows in their order.
        joined: Whether the path goes from each row to the next, ``(*b, t - 1)``.

    Returns:
        The sum of the angles and their number, float64.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
        >>> total, count = turning_angles(x, torch.tensor([True, True]))
        >>> float(total.rad2deg()), int(count)
        (90.0, 1)
    """
    x = x.double()
    steps = x[..., 1:, :] - x[..., :-1, :]
    lengths = torch.linalg.vector_norm(steps, dim=-1)
    joined = joined & (lengths != 0)
    steps = steps / lengths.masked_fill(lengths == 0, 1.0).unsqueeze(-1)
    known, u, v = joined[..., 1:] & joined[..., :-1], steps[..., :-1, :], steps[..., 1:, :]
    # The sides of the rhombus that two unit vectors span.
    sides = (torch.linalg.vector_norm(w, dim=-1) for w in (u - v, u + v))
    angles = torch.where(known, 2 * torch.atan2(*sides), 0.0)
    return angles.sum(-1), known.sum(-1).double()


class TurnsState(State):
    """Hold the sum of angles of each layer.

    Attributes:
        n: Rows seen, int64.
        total: Sum of the angles in radians, ``(*lead, l)`` float64.
        count: Number of the angles, ``(*lead, l)`` float64.
    """

    n: Tensor
    total: Tensor
    count: Tensor

    def merge(self, other: TurnsState) -> TurnsState:
        """Add the sums of two streams over the same layers."""
        if self.total.shape != other.total.shape:
            raise ConfigError(
                f"cannot merge angles of {tuple(self.total.shape)} and {tuple(other.total.shape)} layers; both must "
                "come from the same layers and leading dimensions"
            )
        return TurnsState(n=self.n + other.n, total=self.total + other.total, count=self.count + other.count)


@dataclass(frozen=True)
class Turns(Statistic):
    """Sum the angles by which the rows of each text turn, from one to the next.

    The last of ``rows`` holds the number of the text of each row, ``(*lead, n, 1)``. Rows of one text come in order;
    those of other texts may stand between them. A text that goes on in the next update loses its two angles there.

    Example:
        >>> x, text = torch.tensor([[0.0], [1.0], [3.0], [2.0]]), torch.zeros(4, 1)
        >>> state = Turns().update(Turns().init([x, text], torch.arange(4)), [x, text], torch.arange(4))
        >>> state.total.rad2deg().tolist(), state.count.tolist()
        ([180.0], [2.0])
    """

    name: ClassVar[str] = "turns"

    @property
    def route(self) -> str:
        """Say where the angles are."""
        return "angles within updates"

    def init(self, rows: Sequence[Tensor], ids: Tensor) -> TurnsState:
        """Return zero sums for the layers of ``rows``."""
        working_dtype(rows)
        zeros = torch.zeros(*rows[0].shape[:-2], len(rows) - 1, dtype=torch.float64, device=rows[0].device)
        return TurnsState(n=torch.zeros((), dtype=torch.int64, device=zeros.device), total=zeros, count=zeros)

    @undisturbed
    def update(self, state: TurnsState, rows: Sequence[Tensor], ids: Tensor) -> TurnsState:
        """Add the angles in the rows of one update."""
        *layers, texts = rows
        texts, order = texts[..., 0].to(layers[0].device).sort(dim=-1, stable=True)
        joined = texts[..., 1:] == texts[..., :-1]
        found = []
        for x in layers:
            place = order.to(x.device).unsqueeze(-1).expand_as(x)
            found.append(turning_angles(x.gather(-2, place), joined.to(x.device)))
        total, count = (torch.stack(part, -1) for part in zip(*found, strict=True))
        return state.merge(TurnsState(n=torch.full_like(state.n, x.shape[-2]), total=total, count=count))
