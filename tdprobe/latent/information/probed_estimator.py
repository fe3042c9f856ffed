"""What estimators of labels have in common: fit probes to a bank of rows, label by label."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.latent.attribute_bank import AttributeEstimator, by_layer, laid_out
from tdprobe.latent.attribute_inputs import read
from tdprobe.latent.information.predictive import Array, Family, check_probe
from tdprobe.stats.state import layer_list


class ProbedEstimator(AttributeEstimator):
    """Score layers by what probes make of them, from a bank of rows and their labels.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        labels: Key of the labels, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        out_key: Key to write.
        discrete: Whether labels are integers that number classes: a bool, or one for each column.
        probe: Makes the probes; ``None`` for linear ones.
        seed: Of what is drawn.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
    """

    least_rows = 4

    def __init__(
        self, in_key: Any, labels: Any, out_key: Any, discrete: Any, probe: Any, seed: int, bank_size: int
    ) -> None:
        super().__init__(in_key, labels, out_key, discrete, bank_size)
        self.labels, self.probe, self.seed = labels, check_probe(probe), seed

    @abstractmethod
    def _value(self, x: Array, y: Array, family: Family) -> tuple[float, float]:
        """Score one label of one data set, float64; return the score and its standard error."""

    def score(self, state: Any) -> TensorDict:
        """Score each layer of a `ReservoirState`.

        Returns:
            ``"score"`` and its standard error over rows ``"se"``, ``(*lead, l, m)`` float64, NaN for layers that are
            not finite; ``"finite"``.

        Raises:
            ConfigError: Too few rows, or labels that are not finite or, where discrete, no integers.
        """
        n = int(state.n)
        if n < self.least_rows:
            raise ConfigError(f"got {n} rows; {self.spec.name} fits probes and needs {self.least_rows} rows or more")

        def work(z: Tensor, known: tuple[Tensor, tuple[bool, ...]]) -> Tensor:
            found = [self._value(*given) for given in columns(z, *known, self.probe, self.seed)]
            return torch.tensor(found, dtype=torch.float64, device=z.device).reshape(-1, 2)

        found = by_layer(state, len(self.target_keys), self._discrete, lambda *known: known, work)
        lead = layer_list(state.rows)[0].shape[:-2]
        score, se = ([[None if x is None else x[:, i] for x in layer] for layer in found] for i in range(2))
        return self._table(score, lead).set("se", laid_out(se, lead))


def columns(
    z: Tensor, a: Tensor, discrete: tuple[bool, ...], probe: Any, seed: int
) -> list[tuple[Array, Array, Family]]:
    """Return the rows, one column of labels and its family, for every column; classes are numbered 0, 1, ...."""
    x, found = z.cpu().numpy(), []
    for y, flag in zip(a.cpu().numpy().T, discrete, strict=True):
        found.append((x, y, Family(int(y.max()) + 1 if flag else None, probe, seed)))
    return found


def single(x: Any, y: Any, discrete: bool, probe: Any, seed: int, least: int) -> tuple[Array, Array, Family]:
    """Return rows, labels and family of tensors in hand.

    Raises:
        ConfigError: Shapes that do not fit, values that are not finite, several columns of labels, or too few rows.
    """
    if np.ndim(x) and len(x) < least:
        raise ConfigError(f"got {len(x)} rows; probes are fitted to parts of them, which takes {least} rows or more")
    found = read(x, y, discrete=discrete, wide=False, names=("x", "y"))
    if found.a.shape[1] != 1:
        raise ConfigError(f"y has {found.a.shape[1]} columns; give one label per row, (n,)")
    return columns(found.z, found.a, found.discrete, check_probe(probe), seed)[0]
