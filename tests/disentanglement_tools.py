"""Slow and plain references for mutual information by neighbours, and for what is made of it."""

from __future__ import annotations

import numpy as np
from scipy.special import psi
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

EQUAL = 1e-10


def kraskov(x, y, k=3):
    """Look at every sample and every other, in plain Python: the estimate with boxes that ties need."""
    # Standard deviations of sorted values, so that equal columns are scaled alike whatever the order of the rows.
    q = (np.std(np.sort(x)) or 1.0) / (np.std(np.sort(y)) or 1.0)
    n, total = len(x), 0.0
    for i in range(n):
        dx, dy = abs(x - x[i]), abs(y - y[i]) * q
        d = np.maximum(dx, dy)
        r = np.sort(d)[k]  # the sample itself comes first
        if r == 0:
            total += psi((d == 0).sum()) - psi((dx == 0).sum()) - psi((dy == 0).sum())
            continue
        options, low, high = [], r * (1 - EQUAL), r * (1 + EQUAL)
        for u, v in ((dx, dy), (dy, dx)):
            if ((u >= low) & (u <= high) & (v <= high)).any():
                options.append(psi(((u < low) & (v <= high)).sum()) - psi((u < low).sum()) - psi((v <= high).sum()))
        total += np.mean(options)
    return max(0.0, psi(n) + total / n)


def ross(x, labels, k=3):
    """Look at every sample and every other of its class, in plain Python."""
    size = np.array([(labels == label).sum() for label in labels])
    x, labels, size = x[size > 1], labels[size > 1], size[size > 1]
    total = 0.0
    for i in range(len(x)):
        d, same = abs(x - x[i]), labels == labels[i]
        r = np.sort(d[same])[min(k, size[i] - 1)]
        near = d < r * (1 - EQUAL) if r > 0 else d == 0
        total += psi((near & same).sum()) - psi(size[i]) - psi(near.sum())
    return max(0.0, psi(len(x)) + total / len(x))


def table(a, b):
    """Count the samples of each row, column and cell of a contingency table."""
    kept = np.array([(a == x).sum() > 1 and (b == y).sum() > 1 for x, y in zip(a, b, strict=True)])
    a, b = a[kept], b[kept]
    terms = [
        psi(((a == x) & (b == y)).sum()) - psi((a == x).sum()) - psi((b == y).sum()) for x, y in zip(a, b, strict=True)
    ]
    return max(0.0, psi(len(a)) + np.mean(terms))


def sklearn_mi(x, y, discrete=False):
    """Ask scikit-learn, with its own noise, about a column and an attribute."""
    ask = mutual_info_classif if discrete else mutual_info_regression
    return ask(x.reshape(-1, 1), y, random_state=0)[0]


def sklearn_gaps(z, a, reg_dim=None, discrete=False):
    """Compute the four gaps column by column from scikit-learn's estimates, as their definitions say."""
    m = a.shape[1]
    mi = np.array([[sklearn_mi(z[:, d], a[:, i], discrete) for i in range(m)] for d in range(z.shape[1])])
    entropy = [sklearn_mi(a[:, i], a[:, i], discrete) for i in range(m)]
    dims = list(range(m)) if reg_dim is None else list(reg_dim)
    found = {name: [] for name in ("mig", "filled", "dmig", "dlig", "xmig")}
    for i in range(m):
        ascending = np.sort(mi[:, i])
        others = [(mi[d, i], d) for d in range(len(mi)) if d != dims[i]]
        own, (best, d) = mi[dims[i], i], max(others)
        left = entropy[i] - sklearn_mi(a[:, i], a[:, dims.index(d)], discrete) if d in dims else entropy[i]
        found["mig"].append((ascending[-1] - ascending[-2] if reg_dim is None else own - best) / entropy[i])
        found["filled"].append((own - best) / entropy[i])
        found["dmig"].append((own - best) / left)
        best, j = max((mi[dims[i], j], j) for j in range(m) if j != i) if m > 1 else (np.nan, i)
        found["dlig"].append((own - best) / (entropy[i] - sklearn_mi(a[:, i], a[:, j], discrete)))
        free = [mi[d, i] for d in range(len(mi)) if d not in dims]
        found["xmig"].append((own - max(free)) / entropy[i] if free else np.nan)
    return {name: np.array(values) for name, values in found.items()}


def tied_columns(n=80, seed=0):
    """Return pairs of columns by what repeats in them."""
    g = np.random.default_rng(seed)
    u, v = g.normal(size=n), g.normal(size=n)
    integers = g.integers(0, 6, n).astype(float)
    return {
        "rectified and continuous": (u.clip(0), v),
        "rectified and rectified": (u.clip(0), (u + v).clip(0)),
        "rectified and integer": (u.clip(0), integers),
        "integer and continuous": (integers, integers + v),
        "integer and integer": (integers, (integers + g.integers(0, 3, n)) % 6),
        "many integers": (g.integers(0, 40, n).astype(float), g.integers(0, 40, n).astype(float)),
        "equal": (u, u.copy()),
        "equal integers": (integers, integers.copy()),
        "constant": (np.ones(n), v),
        "both constant": (np.ones(n), np.zeros(n)),
        "tenths": (u.round(1), v.round(1)),
        "grid": (np.repeat(np.arange(8.0), n // 8), np.tile(np.arange(n // 8 * 1.0), 8)),
        "tiny differences": (u.round(1) + 1e-13 * g.normal(size=n), u),
        "binary": ((u > 0) * 1.0, (u + v > 0) * 1.0),
        "repeated rows": (np.repeat(u[: n // 4], 4), np.repeat(v[: n // 4], 4)),
        "far off": (u.round(1) + 1e6, v),
    }
