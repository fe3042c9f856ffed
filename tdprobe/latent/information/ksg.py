"""Mutual information of two layers of few dimensions by counting neighbours."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations_with_replacement, product
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Bool, Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import PairEstimator
from tdprobe.latent.disentanglement.columns import EQUAL, digamma_table
from tdprobe.registry import Spec, register
from tdprobe.stats.distances import Space
from tdprobe.stats.reservoir import Reservoir, ReservoirState
from tdprobe.stats.state import Statistic, layer_list
from tdprobe.stream.batch import Batch

# Rows at once, and bytes for their distances in all layers.
BLOCK, BUDGET = 128, 64 * 2**20
# Beyond so many columns neighbours are about as far away as anything else, and counts of them say little.
WIDE = 20


def ksg_mutual_information(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    """Estimate the mutual information of two sets of columns, in nats, from the neighbours of rows.

    With ``r_i`` the distance of row i to its k-th neighbour in the maximum norm of all columns, each in its standard
    deviation, and ``n_x``, ``n_y`` the numbers of rows closer than that in x and in y, itself included:
    ``I = psi(k) + psi(n) - mean_i(psi(n_x) + psi(n_y))``. It may be a little below 0.

    Rows that are equal in x and y count once, or the estimate would be infinite; a warning tells how many there are.
    For few columns: with ten or more, what it misses grows quickly.

    Args:
        x: ``(n, d_x)`` or ``(n,)``, real.
        y: ``(n, d_y)`` or ``(n,)``: another layer, or numbers that are known of the rows.
        k: Neighbours; few have little bias and much variance.

    Returns:
        Nats, and its standard error over rows; NaN if a value is not finite.

    Raises:
        ConfigError: Different numbers of rows, or fewer than ``k + 1`` that differ.

    Example:
        >>> x, noise = torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
        >>> value, se = ksg_mutual_information(x, x + noise)
        >>> abs(value - 0.6931) < 0.1  # twice 0.5 log 2
        True

    References:
        Kraskov, Stögbauer, Grassberger 2004, Estimating mutual information (first estimator).
    """
    layers = [z.detach().unsqueeze(1) if z.ndim == 1 else z.detach() for z in (x, y)]
    if any(z.ndim != 2 for z in layers) or len(layers[0]) != len(layers[1]):
        raise ConfigError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}; both are (n, d) or (n,), of the same n")
    _check(len(x), k)
    if not all(bool(z.isfinite().all()) for z in layers):
        return float("nan"), float("nan")
    with torch.inference_mode(False), torch.no_grad():
        found = _Counts([_space(z) for z in layers], k)
        score, se, repeated = found.scores()
    if int(repeated[0, 1]):
        warnings.warn(f"{int(repeated[0, 1])} of {len(x)} rows repeat earlier ones and are left out", stacklevel=2)
    return float(score[0, 1]), float(se[0, 1])


def _check(n: int, k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"got k={k!r}; allowed are integers from 1 on, such as 3")
    if n < k + 1:
        raise ConfigError(f"got {n} rows; ksg with k={k} needs at least k+1 = {k + 1} rows")


def _space(rows: Float[Tensor, "n d"]) -> Space:
    """Bring columns to mean 0 and variance 1; constant ones to 0."""
    x = rows.double()
    x = x - x.mean(0)
    spread = x.std(0, correction=0)
    constant = (rows == rows[:1]).all(0)
    return Space(torch.where(constant, 0.0, x / torch.where(constant, 1.0, spread)), p=torch.inf)


class _Counts:
    """Count neighbours for all pairs of layers of one data set, a block of rows of all layers at a time.

    Args:
        spaces: The layers.
        k: Neighbours.
    """

    def __init__(self, spaces: Sequence[Space], k: int) -> None:
        self.spaces, self.k, self.n = spaces, k, len(spaces[0].own)
        self.pairs = list(combinations_with_replacement(range(len(spaces)), 2))
        self.kept = [_first_of_equal(spaces[i].own, spaces[j].own) for i, j in self.pairs]

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, standard errors and repeated rows, ``(l, l)`` each."""
        device, layers = self.spaces[0].own.device, len(self.spaces)
        terms = torch.empty(len(self.pairs), self.n, dtype=torch.float64, device=device)
        digamma = digamma_table(self.n, device)
        size = max(16, min(BLOCK, BUDGET // (8 * self.n * layers)))
        for rows in torch.arange(self.n, device=device).split(size):
            far = [_distances(space, rows) for space in self.spaces]
            for place, (i, j) in enumerate(self.pairs):
                terms[place, rows] = self._terms(far[i], far[j], self.kept[place], digamma)
        found = torch.full((3, layers, layers), torch.nan, dtype=torch.float64, device=device)
        for (i, j), kept, term in zip(self.pairs, self.kept, terms, strict=True):
            m = int(kept.sum())
            own = term[kept]
            # A layer and itself, or too few rows that differ: there is no k-th neighbour.
            score = digamma[self.k] + digamma[m] + own.mean() if m > self.k else torch.nan
            se = own.std() / m**0.5 if m > self.k else torch.nan
            for a, b in ((i, j), (j, i)):
                found[:, a, b] = torch.tensor([score, se, self.n - m], dtype=torch.float64, device=device)
        return found[0], found[1], found[2]

    def _terms(self, x: Tensor, y: Tensor, kept: Bool[Tensor, " n"], digamma: Tensor) -> Float[Tensor, " r"]:
        # The row itself comes first.
        joint = torch.maximum(x, y).masked_fill_(~kept, torch.inf)
        radius = joint.topk(min(self.k + 1, self.n), largest=False).values[:, -1:] * (1 - EQUAL)
        near = [((far < radius) & kept).sum(1) for far in (x, y)]
        return -digamma[near[0]] - digamma[near[1]]


def _distances(space: Space, rows: Tensor) -> Float[Tensor, "r n"]:
    """Return the distances of some rows to all rows, 0 among equal ones."""
    blocks = space.exact_block(rows)
    return torch.where(blocks < torch.inf, blocks, 0.0)[:, space.own]


def _first_of_equal(x: Tensor, y: Tensor) -> Bool[Tensor, " n"]:
    """Tell which rows are the first of those that are equal in both layers, given by the number of their point."""
    _, pair = (x * (int(y.max()) + 1) + y).unique(return_inverse=True)
    places = torch.arange(len(pair), device=pair.device)
    first = torch.full_like(places, len(places)).scatter_reduce_(0, pair, places, "amin")
    return first[pair] == places


@register(
    Spec(
        name="ksg",
        kind="pair",
        symmetric=True,
        bounds=(float("-inf"), float("inf")),
        larger_means="more in common",
        invariant_to=frozenset({"permutation", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n^2 per pair, for a bank of n rows",
        reference="Kraskov et al. 2004, Estimating mutual information",
    )
)
class KsgEstimator(PairEstimator):
    """Estimate the mutual information of two layers of few dimensions, see `ksg_mutual_information`.

    For layers of up to ten columns or so: bottlenecks, latents, projections. Wider ones come with a warning.

    Rows that are equal in both layers count once for a pair; each layer's own repetitions are counted and reported, as
    all measures of neighbours do. A layer and itself have infinitely much in common, of which the estimate gives
    ``psi(n) - psi(k)``.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k: Neighbours.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, or ``k`` below 1.

    Example:
        >>> x, noise = torch.randn(2, 1000, 1, generator=torch.Generator().manual_seed(0))
        >>> td = KsgEstimator()(TensorDict({"data_a": x, "data_b": 3 * (x + noise)}))
        >>> bool((td["ksg"] - 0.3466).abs() < 0.1)  # 0.5 log 2
        True

    References:
        Kraskov, Stögbauer, Grassberger 2004, Estimating mutual information (first estimator).
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "ksg",
        k: int = 3,
        *,
        bank_size: int = 2048,
    ) -> None:
        super().__init__([in_key_a, in_key_b], [out_key])
        _check(k + 1 if isinstance(k, int) else 0, k)
        self.in_key_a, self.in_key_b, self.out_key, self.k, self.bank_size = in_key_a, in_key_b, out_key, k, bank_size
        Reservoir(bank_size)

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def score(self, state: ReservoirState) -> TensorDict:
        """Score all layer pairs.

        Returns:
            ``"score"`` and its standard error over rows ``"se"``, ``(*lead, l, l)`` float64, NaN for pairs with fewer
            than k + 1 rows that differ; ``"duplicates"`` and ``"finite"``.

        Raises:
            ConfigError: Fewer than k + 1 rows.
        """
        _check(int(state.n), self.k)
        rows = [x.detach() for x in layer_list(state.rows)]
        wide = sorted({x.shape[-1] for x in rows if x.shape[-1] > WIDE})
        if wide:
            warnings.warn(
                f"ksg got layers of {', '.join(map(str, wide))} columns; it counts neighbours, which say little beyond "
                f"{WIDE}: project layers to a few directions, or use v_information or matrix_mutual_information",
                stacklevel=3,
            )
        lead, count = rows[0].shape[:-2], len(rows)
        finite = torch.stack([x.isfinite().flatten(-2).all(-1) for x in rows], -1)
        score, se = torch.full((2, *lead, count, count), torch.nan, dtype=torch.float64, device=rows[0].device)
        duplicates = torch.zeros(*lead, count, dtype=torch.int64, device=rows[0].device)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
            for index in product(*map(range, lead)):
                good = finite[index].nonzero().squeeze(-1)
                if not len(good):
                    continue
                spaces = [_space(rows[i][index]) for i in good.tolist()]
                values = _Counts(spaces, self.k).scores()
                for table, found in zip((score, se), values, strict=False):
                    table[index][good.unsqueeze(1), good] = found
                duplicates[index][good] = torch.stack([space.repeated.sum() for space in spaces])
        return TensorDict({"score": score, "se": se, "duplicates": duplicates, "finite": finite})
