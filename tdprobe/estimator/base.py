"""Estimators: config that turns a state into scores, for a stream and for tensors in hand alike."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdprobe._types import UnraveledKey
from tdprobe.errors import ConfigError, MissingKeyError, closest
from tdprobe.estimator.scores import not_finite, repeated_rows, warn_not_finite, warn_repeated
from tdprobe.registry import Spec
from tdprobe.stats.state import Derivation, State, Statistic
from tdprobe.stream.batch import Batch


class Estimator(TensorDictModuleBase, ABC):
    """Turn a state into scores; the estimator itself holds config only.

    A stream is ``state = init(batch)``, ``state = update(state, batch)`` per batch, and ``score(state)``. The
    call on a tensordict is ``score(update(init))`` of its tensors, so the two cannot disagree.

    Args:
        in_keys: Keys to read in a one-shot call, one per layer: ``(*lead, n, d)``.
        out_keys: Keys to write, in the order of `_outputs`.
    """

    spec: ClassVar[Spec]

    def __init__(self, in_keys: Sequence[Any], out_keys: Sequence[Any]) -> None:
        super().__init__()
        for key in (*in_keys, *out_keys):
            if not isinstance(key, UnraveledKey):
                raise ConfigError(f"got key {key!r}; allowed are a string and a flat tuple of strings")
        self.in_keys = list(in_keys)
        self.out_keys = list(out_keys)

    @abstractmethod
    def statistic(self) -> Statistic:
        """Return what this estimator reads."""

    @abstractmethod
    def score(self, state: Any) -> TensorDict:
        """Compute the scores of all layers (pairs) of a state.

        Returns:
            ``"score"``: ``(*lead, l, l)`` of a pair estimator, ``(*lead, l)`` of a layer estimator, float64.
            ``"se"``, the standard error of each, may come with it; ``"finite"``, ``(*lead, l)`` bool, may tell
            which layers hold finite numbers only, ``"duplicates"``, ``(*lead, l)`` int64, how many rows of each
            repeat an earlier one.
        """

    def derivation(self, state: Any) -> Derivation | None:
        """Say what `score` works out from a state first; what several estimators need is worked out once.

        `score` takes the state and what was derived from it alike.
        """
        return None

    @abstractmethod
    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        """Pick the value of each out key from the scores of a one-shot call."""

    def at_hand(self) -> tuple[Statistic, ...]:
        """Return all statistics from which the score of rows that come in one update is the same."""
        return (self.statistic(),)

    def _one_shot(self, batch: Batch) -> Statistic:
        """Return the statistic for rows that are all at hand; override where another one is cheaper."""
        return self.statistic()

    @property
    def target_keys(self) -> tuple[Any, ...]:
        """Keys of what it reads besides the layers."""
        return ()

    def inputs(self, batch: Batch) -> list[Tensor]:
        """Return what the statistic reads of a batch: the rows of every layer."""
        return list(batch.rows.values())

    @final
    def init(self, batch: Batch) -> State:
        """Return the empty state for the layers of a batch."""
        return self.statistic().init(self.inputs(batch), batch.ids)

    @final
    def update(self, state: State, batch: Batch) -> State:
        """Return the state with a batch added; the given state keeps its value."""
        return self.statistic().update(state, self.inputs(batch), batch.ids)

    @final
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Score the tensors under ``in_keys`` and write the results, float32, under ``out_keys``.

        Every leading dimension is an independent data set. Results carry no gradient.

        Args:
            td: Holds ``(*lead, n, d)`` under every in key; integers count as float32.

        Returns:
            The same tensordict.

        Raises:
            TypeError: Anything but a tensordict.
            KeyError: An in key is missing.
            ValueError: Shapes or devices that do not go together.
        """
        if not is_tensor_collection(td):
            raise TypeError(
                f"{type(self).__name__} got {type(td).__name__}; it takes a TensorDict that holds "
                f"{self.in_keys}: TensorDict({{{self.in_keys[0]!r}: x, ...}})"
            )
        batch = self._read(td)
        rows, statistic = self.inputs(batch), self._one_shot(batch)
        scores = self.score(statistic.update(statistic.init(rows, batch.ids), rows, batch.ids))
        warn_not_finite(not_finite(scores, list(batch.rows)))
        warn_repeated(repeated_rows([scores], list(batch.rows)))
        for key, value in zip(self.out_keys_source, self._outputs(scores), strict=True):
            td.set(key, value.float())
        return td

    def _read(self, tensordict: TensorDictBase) -> Batch:
        rows: dict[str, Tensor] = {}
        for key in self.in_keys:
            x = self._tensor(tensordict, key)
            # One key may be compared with itself, and a batch needs a name for each of its layers.
            label = str(key) if str(key) not in rows else f"{key} (again)"
            rows[label] = x if x.is_floating_point() or x.is_complex() else x.float()
        first, *others = rows
        lead, device, n = rows[first].shape[:-2], rows[first].device, rows[first].shape[-2]
        for name in others:
            _require_alike("leading dimensions", first, tuple(lead), name, tuple(rows[name].shape[:-2]))
            _require_alike("device", first, device, name, rows[name].device)
            _require_alike("number of samples", first, n, name, rows[name].shape[-2])
        if tensordict.batch_size != lead[: tensordict.batch_dims]:
            raise ConfigError(
                f"the tensordict has batch_size {tuple(tensordict.batch_size)}, but the leading dimensions "
                f"of {first!r} are {tuple(lead)} (without samples); use batch_size={list(lead)} or less"
            )
        return Batch(rows, torch.arange(n, device=device))

    def _tensor(self, tensordict: TensorDictBase, key: Any) -> Tensor:
        x = tensordict.get(key, None)
        if x is None:
            raise MissingKeyError(_missing(key, tensordict))
        if not isinstance(x, Tensor) or x.ndim < 2:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(f"{key!r} has {got}; it must be a tensor (N, D) or (..., N, D)")
        return x

    def __repr__(self) -> str:
        """Show the constructor arguments, as they were given."""
        arguments = (f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)
        return f"{type(self).__name__}({', '.join(arguments)})"


class PairEstimator(Estimator):
    """Score two layers against each other; a one-shot call reads two keys."""

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["score"][..., 0, 1]]


class LayerEstimator(Estimator):
    """Score each layer by itself; a one-shot call reads one key."""

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["score"][..., 0]]


def _missing(key: Any, tensordict: TensorDictBase) -> str:
    held = list(tensordict.keys(include_nested=True, leaves_only=True))
    near = closest(str(key), map(str, held))
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"the tensordict lacks {key!r}{hint or ';'} it holds {held}"


def _require_alike(what: str, first: str, expected: Any, name: str, got: Any) -> None:
    if got != expected:
        raise ConfigError(f"{first!r} has {what} {expected} and {name!r} has {got}; they must be the same")
