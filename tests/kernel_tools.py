"""Slow and plain references for kernels: whole n x n matrices in float64."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import pairwise_distances

from neighbor_tools import distances


def related(n, d_a=4, d_b=6, seed=0):
    """Draw two representations with something in common, nonlinear too: (n, d_a + 3) and (n, d_b + 3) float64."""
    import torch

    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=g, dtype=torch.float64)
    a = torch.cat([common, torch.randn(n, d_a, generator=g, dtype=torch.float64)], 1)
    b = torch.cat([common.square() + common, torch.randn(n, d_b, generator=g, dtype=torch.float64)], 1)
    return a, b


def array(x):
    return x.double().numpy()


def euclidean(x):
    """Sum differences: what is equal is at distance zero."""
    return distances(x).numpy()


def rdm_of(x, rdm):
    z = array(x)
    if rdm == "euclidean":
        return euclidean(x)
    return pairwise_distances(z - z.mean(1, keepdims=True) if rdm == "correlation" else z, metric="cosine")


def rbf(x, threshold=1.0):
    square = euclidean(x) ** 2
    pairs = square[np.triu_indices(len(square), 1)]
    return np.exp(-square / (2 * threshold**2 * np.median(pairs[pairs > 0])))


def cka(p, q, unbiased):
    """Centre by explicit matrices, or follow eq. 5 of Song et al. term by term."""
    return hsic(p, q, unbiased) / np.sqrt(hsic(p, p, unbiased) * hsic(q, q, unbiased))


def hsic(p, q, unbiased):
    n = len(p)
    if not unbiased:
        centring = np.eye(n) - 1 / n
        return np.trace(p @ centring @ q @ centring)
    p, q = p - np.diag(np.diag(p)), q - np.diag(np.diag(q))
    one = np.ones(n)
    return np.trace(p @ q) + one @ p @ one * (one @ q @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ p @ q @ one)


def mid_ranks(values, digits=10):
    """Rank numbers one by one, tied ones (to ``digits`` decimals) by the mean of their places."""
    values = np.round(values, digits)
    ascending = np.sort(values)
    return (np.searchsorted(ascending, values) + np.searchsorted(ascending, values, side="right") + 1) / 2


def rsa(x, y, rdm, comparison):
    pairs = np.triu_indices(len(x), 1)
    a, b = (rdm_of(z, rdm)[pairs] for z in (x, y))
    if comparison == "spearman":
        a, b = mid_ranks(a), mid_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


def distance_correlation(x, y, unbiased):
    a, b = (centred(euclidean(z), unbiased) for z in (x, y))
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def centred(a, unbiased):
    n, rows, total = len(a), a.sum(0), a.sum()
    if not unbiased:
        return a - rows[:, None] / n - rows[None] / n + total / n**2
    a = a - rows[:, None] / (n - 2) - rows[None] / (n - 2) + total / ((n - 1) * (n - 2))
    return a - np.diag(np.diag(a))


def cknna(x, y, k):
    """Walk over the samples: alpha is 1 where j is a neighbour of i in both."""
    layers = [(near(z, k), inner(z)) for z in (x, y)]

    def align(p, q):
        return sum(p[1][i, j] * q[1][i, j] for i in range(len(x)) for j in p[0][i] & q[0][i])

    p, q = layers
    return align(p, q) / np.sqrt(align(p, p) * align(q, q))


def inner(z):
    gram = array(z) - array(z).mean(0)
    gram = gram @ gram.T
    # The mean over l that the paper takes off: zero, but for rounding.
    return gram - gram.mean(1, keepdims=True)


def near(z, k):
    found = []
    for i, row in enumerate(euclidean(z)):
        others = np.delete(np.arange(len(row)), i)
        reach = np.sort(row[others])[k - 1]
        found.append(set(others[row[others] <= reach + 1e-9]))
    return found
