"""The one contract of every statistic: config and state are values, and states merge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce, wraps
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from tensordict import TensorClass, TensorDict
from torch import Tensor

from tdprobe._types import Bool, Float, Real
from tdprobe.errors import ConfigError


class State(TensorClass):
    """Hold what a stream leaves behind: a bounded value that merges with others of its kind.

    A state is never changed in place. Merging is associative, and commutative up to rounding, so batches,
    ranks, shards and resumed runs are all the same operation. Being a tensordict class it has ``.to``,
    ``state_dict``, memory maps and pickling. Every state has ``n``, the number of rows behind it.
    """

    def merge(self, other: Self) -> Self:
        """Return the state that one stream over the rows of both would have left."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to merge")

    def save(self, path: str | Path, **about: Any) -> None:  # ty: ignore[incompatible-method-override]
        """Write the state to one safetensors file, which :func:`tdprobe.stats.load_state` reads.

        Args:
            path: The file; what was there is replaced when all is written.
            **about: ``statistic=``, ``layers=`` and ``meta=`` of :func:`tdprobe.stats.save_state`.
        """
        from tdprobe.stats.saved import save_state

        save_state(path, self, **about)

    def sync(self, group: Any = None, **options: Any) -> Self:
        """Return the merged state of all ranks of an initialised process group; every rank calls it.

        Args:
            group: The group, by default the one of all processes.
            **options: ``timeout=`` of :func:`tdprobe.stats.sync.synced`.
        """
        from tdprobe.stats.sync import synced

        return synced(self, group, **options)


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Statistic(ABC):
    """Say what to keep of a stream; equal statistics are computed once and shared by estimators.

    ``rows`` is one tensor per layer, ``(*lead, n, d_layer)``, the same samples in every layer, and every
    leading dimension is a data set of its own.
    """

    name: ClassVar[str]
    # Whether a state is made of sums, so that it can be kept in groups of rows at no more work.
    additive: ClassVar[bool] = True

    @property
    def route(self) -> str:
        """Say in a few words how scores come about, for tables."""
        return self.name

    def nbytes(self, widths: Sequence[int], data_sets: int = 1) -> int:
        """Return about how many bytes a state takes; 0 where that is never worth a thought.

        Args:
            widths: Width of each layer.
            data_sets: Product of the leading dimensions.
        """
        return 0

    def work(self, widths: Sequence[int], n: int) -> float:
        """Return about how many multiplications n rows take; wanted where several statistics give one value.

        Args:
            widths: Width of each layer.
            n: Rows.

        Raises:
            NotImplementedError: It does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how much work it takes")

    def cheaper(self) -> Statistic | None:
        """Return what to use instead where a state would be too large; ``None`` where there is nothing."""
        return None

    def covers(self, other: Statistic) -> bool:
        """Tell whether the states of this one hold all that the other keeps, so that its estimators can read them."""
        return self == other

    @abstractmethod
    def init(self, rows: Sequence[Tensor], ids: Tensor) -> State:
        """Return the empty state that fits the widths, leading dimensions and device of ``rows``."""

    @abstractmethod
    def update(self, state: Any, rows: Sequence[Tensor], ids: Tensor) -> State:
        """Return ``state`` with ``rows`` added; the given state keeps its value."""


class Derivation(ABC):
    """Say what to work out from a state before scoring; a hashable value, like a statistic.

    What several estimators need of one state is joined and worked out once.
    """

    @abstractmethod
    def joined(self, other: Any) -> Self | None:
        """Return what serves both in one go, or ``None`` where there is no such thing."""

    @abstractmethod
    def __call__(self, state: Any) -> Any:
        """Work it out; the result is a value with the ``n`` of the state."""


def undisturbed(update: Callable[..., S]) -> Callable[..., S]:
    """Run an update outside of the caller's autograd, autocast and inference mode, which are the model's."""

    @wraps(update)
    def run(self: Statistic, state: S, rows: Sequence[Tensor], ids: Tensor) -> S:
        kind = rows[0].device.type if rows else "cpu"
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            return update(self, state, rows, ids)

    return run


def layer_list(by_layer: TensorDict) -> list[Tensor]:
    """Return the tensors of layers ``"0"``, ``"1"``, ... in that order, however the tensordict was stored."""
    return [by_layer[str(index)] for index in range(len(by_layer.keys()))]


def by_layer(tensors: Iterable[Tensor]) -> TensorDict:
    """Key one tensor per layer by ``"0"``, ``"1"``, ...: widths may differ, so they cannot be stacked."""
    return TensorDict({str(index): x for index, x in enumerate(tensors)})


def check_widths(rows: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse rows that do not fit the layers a state was made for.

    Args:
        rows: One tensor per layer, ``(*lead, n, d_layer)``.
        shapes: ``(*lead, d_layer)`` of the state, one per layer.

    Raises:
        ConfigError: Another number of layers, or a layer with another width or other leading dimensions.
    """
    if len(rows) != len(shapes):
        raise ConfigError(f"got rows of {len(rows)} layers, the state has {len(shapes)}; use those of init")
    for index, (x, shape) in enumerate(zip(rows, shapes, strict=True)):
        got = (*x.shape[:-2], x.shape[-1])
        if got != tuple(shape):
            raise ConfigError(
                f"layer {index} has leading dimensions and width {got}, its state has {tuple(shape)}; "
                "start a new state with init for rows of another shape"
            )


def working_dtype(rows: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype for products: the promoted dtype of ``rows``, float32 at least.

    Raises:
        ConfigError: No rows at all, or complex ones.
    """
    if not rows:
        raise ConfigError("got no layers; give the rows of one layer at least")
    if any(x.is_complex() for x in rows):
        raise ConfigError("got complex rows; allowed are real ones: pass real and imaginary parts as columns")
    return reduce(torch.promote_types, (x.dtype for x in rows), torch.float32)


def all_finite(x: Real[Tensor, "*lead n d"]) -> Bool[Tensor, "*lead"]:
    """Tell whether all numbers are finite, by their extremes: a fraction of the time of asking each."""
    if 0 in x.shape[-2:]:
        return torch.ones(x.shape[:-2], dtype=torch.bool, device=x.device)
    return x.amax((-2, -1)).isfinite() & x.amin((-2, -1)).isfinite()


def centre(
    x: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Float[Tensor, "*lead n d"], Float[Tensor, "*lead d"]]:
    """Subtract the column means in two steps, so that an offset of 1000 deviations costs no digits.

    Args:
        x: Rows ``(*lead, n, d)``, n >= 1, any real dtype.
        dtype: Dtype to compute in.
        out: Where to put the centred rows, ``(*lead, n, d)`` in ``dtype``.

    Returns:
        Centred rows in ``dtype`` (a copy) and the means in float64.
    """
    # Converting once takes less than means and differences of mixed dtypes.
    y = x.to(dtype, copy=True) if out is None else out.copy_(x)
    coarse = y.mean(-2)
    y -= coarse.unsqueeze(-2)
    # The first mean is only as exact as the offset allows; what is left is small, hence exact.
    rest = y.mean(-2)
    y -= rest.unsqueeze(-2)
    return y, coarse.double() + rest.double()
