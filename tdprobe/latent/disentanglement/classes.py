"""Mutual information and entropy where a variable is discrete: continuous with classes, classes with classes."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.latent.disentanglement.columns import (
    EQUAL,
    Columns,
    digamma_table,
    inside,
    line_distances,
    nearest_in_line,
    occurrences,
    runs,
)


def ross(x: Float[Tensor, "n c"], labels: Int[Tensor, " n"], k: int) -> Float[Tensor, " c"]:
    """Estimate the mutual information of every column with a discrete variable, in nats.

    With ``r_i`` the distance of sample i to its k-th neighbour in its class (to the last one in a smaller class),
    ``n_i`` the samples of all classes that are closer and ``k_i`` those of its own, itself included in both,
    ``I = psi(n) + mean_i(psi(k_i) - psi(n_class) - psi(n_i))``, 0 at least. Without repeated values ``k_i`` is k; where
    ``r_i = 0``, both count the samples at the same place, which gives the estimate of a contingency table. Samples
    that are alone in their class do not count.

    Args:
        x: Columns, float64.
        labels: Class of each sample, 0, 1, ...
        k: Neighbours.

    Returns:
        NaN if every sample is alone in its class.

    References:
        Ross 2014, Mutual information between discrete and continuous data sets.
    """
    size = labels.bincount()[labels]
    x, labels, size = x[size > 1], labels[size > 1], size[size > 1]
    n = len(x)
    if n == 0:
        return x.new_full((x.shape[1],), torch.nan)
    columns, digamma = Columns.of(x), digamma_table(n, x.device)
    # Class by class, ascending in each of them.
    order = labels[columns.order].argsort(dim=-1, stable=True)
    values, sample = columns.values.gather(-1, order), columns.order.gather(-1, order)
    group = labels[sample]
    radius = nearest_in_line(values, (size - 1).clamp(max=k)[sample], k, group)
    nearer = [gap < radius * (1 - EQUAL) for side in line_distances(values, k - 1, group) for gap in side]
    # The sample itself is in both sides.
    own = torch.where(radius > 0, torch.stack(nearer).sum(0) - 1, occurrences(runs(values, group)))
    column = torch.arange(len(values), device=x.device).unsqueeze(-1)
    first, end = inside(columns.padded, column, values, radius)
    near = torch.where(radius > 0, end - first, columns.copies.gather(-1, order))
    return (digamma[n] + (digamma[own] - digamma[near]).mean(-1) - digamma[size].mean()).clamp_(min=0)


def contingency(a: Int[Tensor, " n"], b: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Estimate the mutual information of two discrete variables from their contingency table, in nats.

    ``I = psi(n) + mean_i(psi(n_ab) - psi(n_a) - psi(n_b))`` with the numbers of samples in the cell, row and column of
    sample i, 0 at least; of a variable and itself it is `class_entropy`. Samples that are alone in their row or column
    do not count; NaN if none is left.
    """
    kept = (a.bincount()[a] > 1) & (b.bincount()[b] > 1)
    a, b = a[kept], b[kept]
    if len(a) == 0:
        return torch.tensor(torch.nan, dtype=torch.float64, device=a.device)
    digamma = digamma_table(len(a), a.device)
    _, cell = torch.stack([a, b]).unique(dim=1, return_inverse=True)
    counts = (x.bincount()[x] for x in (cell, a, b))
    both, row, column = (digamma[count].mean() for count in counts)
    return (digamma[len(a)] + both - row - column).clamp(min=0)


def class_entropy(labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Estimate the entropy of a discrete variable, ``psi(n) - mean_i psi(n_class)``, in nats.

    Samples that are alone in their class do not count; NaN if all are.
    """
    return contingency(labels, labels)
