"""Spectral measures written plainly with numpy, and the data they are tried on."""

from __future__ import annotations

import numpy as np
import torch

from tdprobe.stream.batch import Batch


def prepared(x, center, normalize_rows):
    x = x.double().numpy()
    if normalize_rows:
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.where(lengths == 0, 1, lengths)
    return x - x.mean(0) if center else x


def gram(x, kernel="linear", bandwidth=1.0, center=False, normalize_rows=False):
    """Return the kernel matrix by its definition, centred by H K H."""
    x = prepared(x, False, normalize_rows)
    k = x @ x.T
    if kernel == "rbf":
        gaps = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
        median = np.sort(gaps[np.triu_indices(len(x), 1)])
        median = median[median > 0]
        k = np.exp(-gaps / (2 * bandwidth**2 * np.median(median)))
    if center:
        h = np.eye(len(x)) - 1 / len(x)
        k = h @ k @ h
    return k


def renyi(p, alpha):
    p = p[p > 1e-14 * p.max()]
    p = p / p.sum()
    if alpha == 1:
        return -(p * np.log(p)).sum()
    if alpha == np.inf:
        return -np.log(p.max())
    return np.log((p**alpha).sum()) / (1 - alpha)


def entropy(k, alpha=1.0):
    """Return the matrix entropy of a kernel matrix."""
    return renyi(np.linalg.eigvalsh(k), alpha)


def unit_diagonal(k):
    return k / np.sqrt(np.outer(np.diag(k), np.diag(k)))


def rows(n=60, d=8, seed=0, rank=None):
    """Return correlated rows that are not centred, ``(n, d)`` float64."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or d, d, generator=g, dtype=torch.float64)
    return torch.randn(n, rank or d, generator=g, dtype=torch.float64) @ mixing + 0.7


def changes(x, seed=1):
    """Return an example of every change of columns that a spec can name."""
    g = torch.Generator().manual_seed(seed)
    d = x.shape[1]
    normal = torch.randn(d, d, generator=g, dtype=torch.float64)
    return {
        "permutation": x[:, torch.randperm(d, generator=g)],
        "orthogonal": x @ torch.linalg.qr(normal).Q,
        "isotropic scaling": -float(10 ** (6 * torch.rand((), generator=g) - 3)) * x,
        "translation": x + 5 * torch.randn(d, generator=g, dtype=torch.float64),
        "invertible linear": x @ normal,
    }


def streamed(estimator, layers, sizes, merge=False):
    """Score layers that come in parts, one after the other or each in a state of its own, last one first."""
    n = len(layers[0])
    parts = zip(*(x.split(sizes) for x in layers), torch.arange(n).split(sizes), strict=True)
    batches = [Batch({str(i): x for i, x in enumerate(part[:-1])}, part[-1]) for part in parts]
    if merge:
        first, *others = [estimator.update(estimator.init(batch), batch) for batch in reversed(batches)]
        for other in others:
            first = first.merge(other)
        return estimator.score(first)
    state = estimator.init(batches[0])
    for batch in batches:
        state = estimator.update(state, batch)
    return estimator.score(state)
