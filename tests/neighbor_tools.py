"""Slow and plain references for neighbours, and data that make distances hard."""

from __future__ import annotations

import torch

TIE = 1e-12


def distances(x, p=2.0):
    """Sum differences in float64: (n, n)."""
    x = x.double()
    return torch.cdist(x, x, p, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_distances(x, ranks, distinct=True, beyond=0.0):
    """Sort all distances of each row: (n, ranks)."""
    x = x if x.shape[1] else torch.zeros(len(x), 1)
    others = torch.unique(x, dim=0).double() if distinct else x.double()
    found = torch.cdist(x.double(), others, compute_mode="donot_use_mm_for_euclid_dist")
    if not distinct:
        found.fill_diagonal_(torch.inf)
    found[found <= beyond] = torch.inf
    ascending = torch.cat([found.sort(1).values, torch.full((len(x), max(ranks)), torch.inf)], 1)
    return ascending[:, [rank - 1 for rank in ranks]]


def imbalance(x, y, p=2.0):
    """Rank row by row, tied rows by the mean of their places."""
    n, total = len(x), 0.0
    near, far = distances(x, p), distances(y, p)
    for i in range(n):
        others = torch.arange(n) != i
        a, b = near[i][others], far[i][others]
        targets = b[a <= a.min() * (1 + TIE)]
        nearer = (b.unsqueeze(0) < targets.unsqueeze(1) * (1 - TIE)).sum(1)
        tied = ((b.unsqueeze(0) - targets.unsqueeze(1)).abs() <= targets.unsqueeze(1) * TIE).sum(1)
        total += float((nearer + (tied + 1).double() / 2).mean())
    return 2 * total / n**2


def few_of_many(n, width, active, generator):
    """Return rows of zeros and as many ones, such as codes of a sparse autoencoder say what is active."""
    places = torch.rand(n, width, generator=generator).topk(active).indices
    return torch.zeros(n, width).scatter_(1, places, 1.0)


def hard_layers(n=150):
    """Return pairs of layers by what is hard about them."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    base, line = normal(n, 5), torch.linspace(0, 1, n).unsqueeze(1)
    pairs = base[: n // 2].repeat(2, 1)
    massive = normal(n, 40)
    massive[:, 7] += 3e3 * (torch.arange(n) % 50 == 0)
    return {
        "ordinary": (base, normal(n, 70)),
        "related": (base, base + 0.1 * normal(n, 5)),
        "rectified": (normal(n, 3).relu().round(decimals=1), normal(n, 4).relu().round(decimals=1)),
        "repeated": (base[torch.randint(0, n // 3, (n,), generator=g)], normal(n, 3)),
        "repeated in both": (base[torch.arange(n) % 60], normal(n, 3)[torch.arange(n) % 60 // 2]),
        "binary": (normal(n, 3).sign(), normal(n, 9).sign()),
        "one-hot": (torch.eye(n), 3 * torch.eye(n).roll(7, 0)),
        "few of many": (few_of_many(n, 12, 3, g), few_of_many(n, 90, 5, g)),
        "constant": (torch.ones(n, 3), base),
        "nearly repeated": (base[torch.arange(n) % 40], base[torch.arange(n) % 40] + 1e-7 * normal(n, 5)),
        "near duplicates": (pairs + 1e-6 * normal(n // 2 * 2, 5), base),
        "offset": (base + 1000, normal(n, 3) - 3000),
        "line": (line * normal(1, 50), base),
        "scales": (base * 1e-25, base * 1e25),
        "float64": (base.double() + 1e6, normal(n, 2).double() * 1e-9),
        "outliers": (torch.cat([base[:-2], base[-2:] * 1e6]), torch.cat([base[:-3], base[-3:] * 1e4])),
        "massive column": (massive, base),
        "tight clusters": (base * 1e-5 + 100.0 * (torch.arange(n) % 3).unsqueeze(1), base),
        "half precision": (base.half(), base.bfloat16()),
        "lattice": (torch.cartesian_prod(torch.arange(15.0), torch.arange(n // 15 * 1.0)), base),
        "no columns": (torch.zeros(n, 0), base),
    }


def manifolds(n, seed=0):
    """Return uniform samples of manifolds and their dimension by name: (n, D) float64 and d."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    # The arc length of the roll grows like the square of the angle: uniform on the sheet, not in the angle.
    angle = ((1.5 * torch.pi) ** 2 + uniform(n) * ((4.5 * torch.pi) ** 2 - (1.5 * torch.pi) ** 2)).sqrt()
    roll = torch.stack([angle * angle.cos(), 21 * uniform(n), angle * angle.sin()], 1)
    lift = torch.linalg.qr(normal(30, 30)).Q
    return {
        "line": (uniform(n, 1) @ normal(1, 20), 1),
        "circle": (torch.nn.functional.normalize(normal(n, 2), dim=1), 1),
        "sphere": (torch.nn.functional.normalize(normal(n, 3), dim=1), 2),
        "swiss roll": (roll, 2),
        "sphere in 5 dimensions": (torch.nn.functional.normalize(normal(n, 5), dim=1), 4),
        "cube": (uniform(n, 3) @ lift[:3], 3),
        "hypercube": (uniform(n, 5) @ lift[:5], 5),
    }


def scored(estimator, *rows):
    """Return all scores of layers at hand, as a one-shot call has them before it picks."""
    from tdprobe.stream.batch import Batch

    batch = Batch({f"layer {i}": x for i, x in enumerate(rows)}, torch.arange(rows[0].shape[-2]))
    statistic = estimator._one_shot(batch)
    return estimator.score(statistic.update(statistic.init(rows, batch.ids), rows, batch.ids))


def shared_neighbours(x, k, cosine=False):
    """List, row by row, the k nearest rows with their shares and ranks: [{row: (share, rank)}]."""
    x = x.double() if x.shape[1] else torch.zeros(len(x), 1).double()
    if cosine:
        length = x.norm(dim=1, keepdim=True)
        x = x / torch.where(length > 0, length, 1)
    found = []
    for i, row in enumerate(distances(x)):
        others = sorted((d, j) for j, d in enumerate(row.tolist()) if j != i)
        listed, start = {}, 0
        while start < k:
            end = start + 1
            while end < len(others) and others[end][0] <= others[end - 1][0] * (1 + TIE):
                end += 1
            taken = min(end, k) - start
            rank = taken / sum(1 / place for place in range(start + 1, start + taken + 1))
            listed |= {j: (taken / (end - start), rank) for _, j in others[start:end]}
            start = end
        found.append(listed)
    return found


def cosine_rows(x):
    """Return the cosines between all rows, 0 for rows of zeros."""
    x = x.double()
    length = x.norm(dim=1, keepdim=True)
    x = x / torch.where(length > 0, length, 1)
    return x @ x.mT
