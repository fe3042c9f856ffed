"""One row of test data for each estimator of the registry: how the contract is tested on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

N, WIDTHS = 60, (5, 4, 7)
PATHS = {"attributes": slice(0, 2), "path": slice(2, 3)}


@dataclass(frozen=True)
class Row:
    """Say how an estimator is put to the test.

    Args:
        reference: Plain float64 definition: of one layer, of two, or of a layer and targets.
        least: Fewest rows that give a score; with one less it is an error, or NaN.
        options: Constructor arguments under which a stream of several updates is the exact value.
        unaffected: Changes that are not declared and keep this score all the same, with no promise.
        shift: Offset, in standard deviations, that costs no digits.
        targets: Targets of n rows, where attributes with any values will not do.
        ordered: Rows that belong together must come in order.
        columns: Which columns of the targets each key reads; all by default.
    """

    reference: Callable[..., Any] | None
    least: int
    options: Mapping[str, Any] = field(default_factory=dict)
    unaffected: frozenset[str] = frozenset()
    shift: float = 1000.0
    targets: Callable[[int], torch.Tensor] | None = None
    ordered: bool = False
    columns: Mapping[str, slice] = field(default_factory=dict)


def centred(x):
    return x - x.mean(0)


def linear_cka(x, y):
    x, y = centred(x), centred(y)
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def information_imbalance(x, y):
    from neighbor_tools import imbalance

    return imbalance(x, y)


def plain(name, *options):
    """Return a definition that is written down in whole matrices."""

    def value(x, y):
        import kernel_tools

        return float(getattr(kernel_tools, name)(x, y, *options))

    return value


def two_nn(x):
    from neighbor_tools import neighbour_distances

    near = neighbour_distances(x, (1, 2))
    mu = (near[:, 1] / near[:, 0]).log().sort().values[:-1]
    empirical = -torch.log1p(-torch.arange(1, len(mu) + 1, dtype=torch.float64) / (len(mu) + 1))
    return (mu * empirical).sum() / mu.square().sum()


def near(x, k):
    from neighbor_tools import neighbour_distances

    return neighbour_distances(x, range(1, k + 1)).log()


def likeliest(x):
    """Return the dimension that twenty neighbours make most likely, pooled."""
    return 1 / (near(x, 20)[:, -1:] - near(x, 20)[:, :-1]).mean()


def second_scale(x):
    """Return the dimension from the second and fourth neighbour, by halving an interval."""
    u = near(x, 4)[:, 3] - near(x, 4)[:, 1]
    low, high = torch.tensor([1e-3, 1e3], dtype=torch.float64)
    for _ in range(200):
        d = (low * high).sqrt()
        rises = (len(u) - 1) / d + (u / -torch.expm1(-d * u)).sum() - 3 * u.sum() > 0
        low, high = (d, high) if rises else (low, d)
    return d


def correlation(x):
    radii = near(x, 20)[:, [9, 19]].exp().quantile(0.5, 0)
    counts = (torch.cdist(x, x).unsqueeze(2) < radii).sum((0, 1)).double() - len(x)
    return (counts[1] / counts[0]).log() / (radii[1] / radii[0]).log()


def local_components(x):
    counts = []
    for row in torch.cdist(x, x):
        variances = spectrum(centred(x[row.argsort()[1:21]])).square()
        counts.append(float((variances > 0.05 * variances[0]).sum()))
    return torch.tensor(counts).double().mean()


def common_neighbours(x, y):
    """Tell which of the ten nearest rows of each row are those of the other layer too, (n, n)."""
    lists = [torch.zeros(len(z), len(z)).scatter_(1, torch.cdist(z, z).argsort(1)[:, 1:11], 1) for z in (x, y)]
    return (lists[0] * lists[1]).double()


def jaccard(x, y):
    common = common_neighbours(x, y).sum(1)
    return (common / (20 - common)).mean()


def rank_similarity(x, y):
    common = common_neighbours(x, y)
    a, b = (torch.cdist(z, z).argsort(1).argsort(1).double() for z in (x, y))
    harmonic = torch.cat([torch.ones(1), (1 / torch.arange(1, 11).double()).cumsum(0)])
    terms = common * 2 / ((1 + (a - b).abs()) * (a + b).clamp(min=1))
    return (terms.sum(1) / harmonic[common.sum(1).long()]).mean()


def second_order_cosine(x, y):
    cosines = [z / z.norm(dim=1, keepdim=True) for z in (x, y)]
    cosines = [z @ z.T for z in cosines]
    near = [torch.zeros_like(z).scatter_(1, z.argsort(1, descending=True)[:, 1:11], 1) for z in cosines]
    a, b = (z * (near[0] + near[1] > 0) for z in cosines)
    return torch.cosine_similarity(a, b, dim=1).mean()


def spectrum(x):
    """Return the singular values of rows."""
    return torch.linalg.svdvals(x)


def entropy(weights):
    p = weights / weights.sum()
    return -(p * p.log()).sum()


def median_kernel(x):
    gaps = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
    return (-gaps / (2 * gaps[gaps.triu(1) > 0].quantile(0.5))).exp()


def joint_entropy(x, y):
    product = median_kernel(x) * median_kernel(y)
    return -(product.square().sum() / len(x) ** 2).log()


def mutual_information(x, y):
    own = [-(median_kernel(z).square().sum() / len(z) ** 2).log() for z in (x, y)]
    return own[0] + own[1] - joint_entropy(x, y)


def views(n):
    """Number the samples that rows are views of: two of the first four rows each, then three each."""
    place = torch.arange(n)
    return torch.where(place < 4, place % 2, place // 3 + 10).double().unsqueeze(1)


def labels(n):
    """Number classes by what the first layer knows, and by what nothing knows."""
    known = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, 0] > 0
    return torch.stack([known, torch.arange(n) % 3 == 0], 1).double()


def ksg(x, y, k=3):
    """Return the mutual information of rows that all differ, from whole matrices of distances."""
    x, y = ((z - z.mean(0)) / z.std(0, correction=0) for z in (x, y))
    far = [torch.cdist(z, z, torch.inf) for z in (x, y)]
    radius = torch.maximum(*far).kthvalue(k + 1, 1, keepdim=True).values
    counts = [(z < radius).sum(1).double().digamma().mean() for z in far]
    n, k = torch.tensor([float(len(x)), float(k)], dtype=torch.float64).digamma()
    return n + k - counts[0] - counts[1]


def texts(n):
    return (torch.arange(n) // 10).double().unsqueeze(1)


def along_paths(n):
    """Return two attributes of n samples, and the paths that they lie on: of 7 places, the last one shorter."""
    g = torch.Generator().manual_seed(4)
    return torch.cat([torch.randn(n, 2, generator=g).double(), (torch.arange(n) // 7).double().unsqueeze(1)], 1)


def mean_over_paths(measure):
    """Return a definition that looks at the paths one by one, and takes the first units for those of the attributes."""

    def value(x, y):
        paths = [y[:, 2] == number for number in y[:, 2].unique()]
        found = [[measure(x[at, i].tolist(), y[at, i].tolist()) for at in paths if at.sum() > 2] for i in range(2)]
        return torch.tensor(found, dtype=torch.float64).mean(1)

    return value


def slopes(x, y):
    return [(y[k + 1] - y[k]) / (x[k + 1] - x[k]) for k in range(len(x) - 1)]


def smooth(x, y):
    steps = slopes(x, y)
    bends = [abs(b - a) for a, b in pairwise(steps)]
    return 1 - sum(b * b for b in bends) / sum(bends) / (max(steps) - min(steps))


def monotone(x, y):
    signs = [(s > 0) - (s < 0) for s in slopes(x, y) if abs(s) > 1e-3]
    return sum(signs) / len(signs)


def correlations(x, y):
    frames = [torch.linalg.qr(centred(z)).Q for z in (x, y)]
    return torch.linalg.svd(frames[0].T @ frames[1], full_matrices=False)


def components(x, share=0.99):
    u, s, _ = torch.linalg.svd(centred(x), full_matrices=False)
    count = 1 + int((s.square().cumsum(0) < share * s.square().sum()).sum())
    return u[:, :count] * s[:count]


def projection_weighted(x, y):
    u, rho, _ = correlations(x, y)
    weights = ((torch.linalg.qr(centred(x)).Q @ u).T @ centred(x)).abs().sum(1)
    return (weights * rho).sum() / weights.sum()


def procrustes_angle(x, y):
    x, y = (centred(z) / centred(z).norm() for z in (x, y))
    return torch.linalg.matrix_norm(x.T @ y, "nuc").arccos()


def r_squared(x, y):
    x, y = centred(x), centred(y)
    return 1 - (y - x @ torch.linalg.lstsq(x, y).solution).square().sum() / y.square().sum()


def gulp_distance(x, y, ridge=1e-2):
    x, y = (centred(z) / centred(z).norm() for z in (x, y))
    hats = [z @ torch.linalg.inv(z.T @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype)) @ z.T for z in (x, y)]
    return (hats[0] - hats[1]).norm()


def noised_information(x, noise=1.0):
    """Upper bound: minus the mean logarithm of the mean of exp(-KL) between rows under noise."""
    x = x / (noise * x.std(0, correction=0))
    divergences = 0.5 * (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
    return -(-divergences).exp().mean(1).log().mean()


def unit_information(x, y):
    """Return the mutual information of every unit with every attribute, from plain loops."""
    from disentanglement_tools import kraskov

    return torch.tensor([[kraskov(u, v) for v in y.T.numpy()] for u in x.T.numpy()])


def attribute_entropy(y):
    from disentanglement_tools import kraskov

    return torch.tensor([kraskov(v, v) for v in y.T.numpy()])


def information_gap(x, y):
    first, second = unit_information(x, y).topk(2, dim=0).values
    return (first - second) / attribute_entropy(y)


def gap_to_free_units(x, y):
    known, taken = unit_information(x, y), {}
    while len(taken) < 2:
        left = {(d, i): float(known[d, i]) for d in range(len(known)) for i in range(2) if i not in taken}
        unit, attribute = max((key for key in left if key[0] not in taken.values()), key=left.get)
        taken[attribute] = unit
    own = torch.stack([known[taken[i], i] for i in range(2)])
    free = [d for d in range(len(known)) if d not in taken.values()]
    return (own - known[free].max(0).values) / attribute_entropy(y)


def mean_modularity(x, y):
    squares = unit_information(x, y).square()
    most = squares.max(1).values
    kept = most > 0
    by_unit = 1 - (squares.sum(1)[kept] / most[kept] - 1)
    return ((by_unit * most[kept].sqrt()).sum() / most.sqrt().sum()).reshape(1)


def correlation_gap(x, y):
    r = torch.corrcoef(torch.cat([x, y], 1).T)[: x.shape[1], x.shape[1] :].square()
    first, second = r.topk(2, dim=0).values
    return first - second


ROWS: dict[str, Row] = {
    "cka": Row(linear_cka, least=1),
    "procrustes": Row(procrustes_angle, least=2),
    "cca": Row(lambda x, y: correlations(x, y)[1].mean(), least=2),
    "svcca": Row(lambda x, y: correlations(components(x), components(y))[1].mean(), least=2),
    "pwcca": Row(projection_weighted, least=2),
    "linear_regression": Row(r_squared, least=2),
    "gulp": Row(gulp_distance, least=2),
    "information_imbalance": Row(information_imbalance, least=2),
    "rsa": Row(plain("rsa", "correlation", "spearman"), least=3),
    "distance_correlation": Row(plain("distance_correlation", True), least=4),
    "cknna": Row(plain("cknna", 10), least=11),
    "twonn": Row(two_nn, least=3),
    "local_knn": Row(None, least=5),
    "mle": Row(likeliest, least=21),
    "gride": Row(second_scale, least=5),
    "corr_int": Row(correlation, least=21),
    "local_pca": Row(local_components, least=21, options={"k": 20}),
    "mutual_knn": Row(lambda x, y: common_neighbours(x, y).sum(1).mean() / 10, least=12),
    "jaccard": Row(jaccard, least=12),
    "rank_similarity": Row(rank_similarity, least=12),
    "second_order_cosine": Row(second_order_cosine, least=12),
    "participation_ratio": Row(
        lambda x: spectrum(centred(x)).square().sum() ** 2 / spectrum(centred(x)).pow(4).sum(), 2
    ),
    "effective_rank": Row(lambda x: entropy(spectrum(centred(x)).square()).exp(), least=2),
    "rankme": Row(lambda x: entropy(spectrum(x)).exp(), least=1),
    "matrix_entropy": Row(lambda x: entropy(spectrum(x / x.norm(dim=1, keepdim=True)).square()), least=1),
    "matrix_joint_entropy": Row(joint_entropy, least=2),
    "matrix_mutual_information": Row(mutual_information, least=2),
    "dime": Row(None, least=2),
    "lidar": Row(None, least=4, targets=views),
    "noised_information": Row(noised_information, least=1),
    # Numbers to this row, and classes to the streaming form, which is as its name makes it.
    "v_information": Row(None, least=10, options={"discrete": False}, targets=labels),
    "mdl": Row(None, least=4, targets=labels),
    "ksg": Row(ksg, least=4),
    "mig": Row(information_gap, least=4),
    "dmig": Row(None, least=4),
    "dlig": Row(None, least=4),
    "xmig": Row(gap_to_free_units, least=4),
    "modularity": Row(mean_modularity, least=4),
    "sap": Row(correlation_gap, least=4),
    "dci": Row(None, least=8, unaffected=frozenset({"permutation"})),
    "smoothness": Row(mean_over_paths(smooth), least=3, targets=along_paths, ordered=True, columns=PATHS),
    "monotonicity": Row(
        mean_over_paths(monotone),
        least=2,
        unaffected=frozenset({"isotropic scaling"}),
        targets=along_paths,
        ordered=True,
        columns=PATHS,
    ),
    "curvature": Row(None, least=3, targets=texts, ordered=True),
}
