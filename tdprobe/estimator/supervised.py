"""Estimators that score layers against what else is known of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdprobe.errors import ConfigError, MissingKeyError
from tdprobe.estimator.base import Estimator
from tdprobe.stream.batch import Batch


class SupervisedEstimator(Estimator):
    """Score each layer against targets: labels, or attributes of the samples.

    The statistic gets the rows of every layer, then those of every target key. A stream reads the targets from
    each call of the model (`LayerScoring`); a one-shot call reads the first in key as the layer, the others as
    targets, ``(*lead, n, m)``, or ``(n,)`` for a single one.

    Args:
        in_keys: Key of the layer, then the keys of the targets.
        out_keys: Keys to write, in the order of `_outputs`.
    """

    def __init__(self, in_keys: Sequence[Any], out_keys: Sequence[Any]) -> None:
        super().__init__(in_keys, out_keys)
        if len(in_keys) < 2:
            raise ConfigError(f"got the keys {list(in_keys)}; give the key of the layer and that of a target at least")

    @property
    def target_keys(self) -> tuple[Any, ...]:
        """Keys of what else is known of the samples."""
        return tuple(self.in_keys[1:])

    def target_names(self, count: int) -> tuple[str, ...]:
        """Name the columns of the targets, for tables."""
        (key, *others) = map(str, self.target_keys)
        return (key,) if count == 1 and not others else tuple(f"{key}[{place}]" for place in range(count))

    def inputs(self, batch: Batch) -> list[Tensor]:
        """Return the rows of every layer, then of every target.

        Raises:
            MissingKeyError: A target did not come with the batch.
        """
        for key in self.target_keys:
            if key not in batch.targets:
                there = ", ".join(repr(str(name)) for name in batch.targets) or "nothing"
                raise MissingKeyError(
                    f"{type(self).__name__} reads {key!r} along with the layers, and {there} came along; bring "
                    f"it with each call of the model: hooked(x, {key}=...)"
                )
        return [*batch.rows.values(), *(batch.targets[key] for key in self.target_keys)]

    def _read(self, tensordict: TensorDictBase) -> Batch:
        x = self._tensor(tensordict, self.in_keys[0])
        x = x if x.is_floating_point() or x.is_complex() else x.float()
        lead, n = x.shape[:-2], x.shape[-2]
        targets = {}
        for key in self.target_keys:
            y = tensordict.get(key, None)
            if isinstance(y, Tensor) and y.shape == (*lead, n):
                tensordict = tensordict.exclude(key).set(key, y.unsqueeze(-1))
            y = self._tensor(tensordict, key)
            if y.shape[:-1] != x.shape[:-1] or y.device != x.device:
                raise ConfigError(
                    f"{self.in_keys[0]!r} has shape {tuple(x.shape)} on {x.device}, {key!r} has {tuple(y.shape)} on "
                    f"{y.device}; targets have one row of values for every sample, on the same device"
                )
            # Whole numbers stay exact: they may be labels.
            targets[key] = y if y.is_floating_point() else y.double()
        return Batch({str(self.in_keys[0]): x}, torch.arange(n, device=x.device), targets)

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["score"][..., 0, :]]
