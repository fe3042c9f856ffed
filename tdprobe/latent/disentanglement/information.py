"""Mutual information of every latent with every attribute, and of attributes among each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.attribute_inputs import K, read
from tdprobe.latent.disentanglement.classes import class_entropy, contingency, ross
from tdprobe.latent.disentanglement.columns import Columns
from tdprobe.latent.disentanglement.kraskov import kraskov, kraskov_entropy

BINS = 20


def mutual_information(z: Any, a: Any, discrete: Any = False) -> Any:
    """Estimate the mutual information of every latent dimension with every attribute, in nats.

    Two continuous variables by Kraskov's first estimator, a continuous and a discrete one by Ross's, with 3
    neighbours. No noise breaks ties: where values repeat, counting takes that into account, and the result is the same
    for every order of the rows.

    Args:
        z: Latents ``(n, f)``, numpy or torch.
        a: Attributes ``(n,)`` or ``(n, m)``.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.

    Returns:
        ``(f, m)`` float64, as numpy or torch, like ``z``.

    Raises:
        ConfigError: As in `mig`; but f may be smaller than m.

    Example:
        >>> import torch
        >>> z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> found = mutual_information(z, z[:, 0] + z[:, 1])
        >>> bool((found - torch.tensor(2.0).log() / 2).abs().max() < 0.1)
        True

    References:
        Kraskov, Stögbauer, Grassberger 2004, Estimating mutual information. Ross 2014, Mutual information between
        discrete and continuous data sets.
    """
    found = read(z, a, discrete=discrete, wide=False)
    return found.back(Information(found.a, found.discrete, K).latent(found.z))


@dataclass(frozen=True)
class Information:
    """Work out mutual information, in nats, each by the estimator for its kinds of variables.

    Continuous with continuous is `kraskov`, continuous with discrete `ross`, discrete with discrete `contingency`.

    Args:
        a: Attributes ``(n, m)`` float64, classes numbered 0, 1, ...
        discrete: Which of them are discrete.
        k: Neighbours.
    """

    a: Tensor
    discrete: Sequence[bool]
    k: int
    _pairs: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def latent(self, z: Float[Tensor, "n f"]) -> Float[Tensor, "f m"]:
        """Estimate it for every latent and every attribute."""
        found = z.new_empty(z.shape[1], self.a.shape[1])
        smooth = [i for i, discrete in enumerate(self.discrete) if not discrete]
        if smooth:
            found[:, smooth] = kraskov(Columns.of(z), Columns.of(self.a[:, smooth]), self.k)
        for i in set(range(len(self.discrete))) - set(smooth):
            found[:, i] = ross(z, self._labels(i), self.k)
        return found

    @cached_property
    def entropy(self) -> Float[Tensor, " m"]:
        """Estimate the entropy of every attribute, which is what its estimator says of it and itself."""
        smooth = kraskov_entropy(Columns.of(self.a), self.k)
        found = [class_entropy(self._labels(i)) if flag else smooth[i] for i, flag in enumerate(self.discrete)]
        return torch.stack(found)

    def between(self, pairs: Iterable[tuple[int, int]]) -> Float[Tensor, "m m"]:
        """Estimate it for some pairs of attributes; NaN elsewhere."""
        m = self.a.shape[1]
        found = self.a.new_full((m, m), torch.nan)
        for i, j in {(min(pair), max(pair)) for pair in pairs}:
            if (i, j) not in self._pairs:
                self._pairs[i, j] = self._pair(i, j)
            found[i, j] = found[j, i] = self._pairs[i, j]
        return found

    def _pair(self, i: int, j: int) -> Tensor:
        if self.discrete[i] and self.discrete[j]:
            return contingency(self._labels(i), self._labels(j))
        if self.discrete[i]:
            i, j = j, i
        if self.discrete[j]:
            return ross(self.a[:, [i]], self._labels(j), self.k)[0]
        return kraskov(Columns.of(self.a[:, [i]]), Columns.of(self.a[:, [j]]), self.k)[0, 0]

    def _labels(self, i: int) -> Tensor:
        return self.a[:, i].long()


def information(a: Float[Tensor, "n m"], discrete: Sequence[bool], bins: bool, k: int) -> Information:
    """Return what works out mutual information with attributes, cut into bins or as they are."""
    return Information(binned(a, discrete), (True,) * a.shape[1], k) if bins else Information(a, discrete, k)


def binned(a: Float[Tensor, "n m"], discrete: Sequence[bool], bins: int = BINS) -> Float[Tensor, "n m"]:
    """Cut continuous attributes into bins of about equal counts, numbered 0, 1, ...; equal values stay together."""
    columns = Columns.of(a)
    # The middle of the places that equal values take.
    middle = columns.copies / 2 + _first_of_run(columns)
    number = (middle * bins / len(a)).floor().clamp(max=bins - 1).gather(-1, columns.place).mT
    return torch.where(torch.tensor(list(discrete), device=a.device), a, number)


def _first_of_run(columns: Columns) -> Tensor:
    places = torch.arange(columns.order.shape[-1], device=columns.order.device).expand_as(columns.order)
    starts = torch.full_like(places, places.shape[-1]).scatter_reduce_(-1, columns.group, places, "amin")
    return starts.gather(-1, columns.group)
