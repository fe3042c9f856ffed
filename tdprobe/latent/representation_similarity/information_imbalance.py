"""Information imbalance: how well distances in one representation predict those in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import PairEstimator
from tdprobe.registry import Mode, Spec, check_mode, register
from tdprobe.stats.neighborhoods import mean_terms
from tdprobe.stats.neighbors import Neighbors, as_neighbors
from tdprobe.stats.ranks_elsewhere import RanksElsewhere
from tdprobe.stats.reservoir import Reservoir
from tdprobe.stats.state import Statistic
from tdprobe.stream.batch import Batch

LEAST = 2


@register(
    Spec(
        name="information_imbalance",
        kind="pair",
        symmetric=False,
        bounds=(0.0, 2.0),
        larger_means="less similar neighbours",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n^2 per pair, for a bank of n rows",
        reference="Glielmo et al. 2022, Ranking the information content of distance measures",
    )
)
class InformationImbalanceEstimator(PairEstimator):
    """Measure how much the nearest neighbours in one representation say about distances in another.

    ``delta(A -> B) = 2 / n * mean_i r_B(i, nn_A(i))``, with ``nn_A(i)`` the nearest neighbour of row i in A and
    ``r_B`` its rank among the neighbours of i in B, from 1 to n - 1. ``2 / n``, its minimum, says that A knows all
    about the neighbourhoods of B; 1 that it knows nothing. The two directions differ.

    With ``k > 1`` the mean is taken over the k nearest neighbours of each row in A, which varies less from sample to
    sample and looks at a larger scale; the minimum is ``(k + 1) / n``.

    Tied neighbours count alike: the mean is taken over all nearest rows of A, where they are more than the places that
    are left for them each by an equal share, and a tied rank in B is the mean of the tied places. So the order of rows
    never matters; a constant layer scores 1 from and to all others. A layer with NaN or infinite values scores NaN.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key_a_to_b: Key to write, ``(*lead,)`` float32.
        out_key_b_to_a: Key to write, ``(*lead,)`` float32.
        p: Order of the norm, from 0 (number of unequal columns) to infinity.
        k: Neighbours in A, 1 or more; more than one with ``p=2`` only.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``; they agree: ties are shared in both.

    Raises:
        ConfigError: A bad key or mode, a negative ``p``, ``k`` below 1, or above 1 with another norm.

    Example:
        >>> x = torch.arange(10.0).square().unsqueeze(1)
        >>> td = InformationImbalanceEstimator()(TensorDict({"data_a": x, "data_b": 3 - x}))
        >>> td["information_imbalance_a_to_b"]
        tensor(0.2000)

    References:
        Glielmo, Zeni, Cheng, Csanyi, Laio 2022, Ranking the information content of distance measures.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key_a_to_b: Any = "information_imbalance_a_to_b",
        out_key_b_to_a: Any = "information_imbalance_b_to_a",
        p: float = 2.0,
        *,
        k: int = 1,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        super().__init__([in_key_a, in_key_b], [out_key_a_to_b, out_key_b_to_a])
        if not p >= 0:
            raise ConfigError(f"got p={p!r}; allowed are orders of a norm from 0 to infinity")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"got k={k!r}; allowed are integers from 1 on")
        if k > 1 and p != 2:
            raise ConfigError(
                f"got k={k} and p={p!r}; several neighbours are found for p=2 only: leave one of the two out"
            )
        self.in_key_a, self.in_key_b, self.p, self.k, self.bank_size = in_key_a, in_key_b, p, k, bank_size
        self.mode = check_mode(mode)
        self.out_key_a_to_b, self.out_key_b_to_a = out_key_a_to_b, out_key_b_to_a

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def derivation(self, state: Any) -> Neighbors:
        """Ask for the ranks of nearest neighbours in all other layers, or, for several, which they are."""
        if self.k == 1:
            return Neighbors(imbalance=True, p=float(self.p))
        return Neighbors(tuple(range(1, self.k + 2)), places=self.k)

    def score(self, state: Any) -> TensorDict:
        """Compute the imbalance of all layer pairs.

        Args:
            state: `ReservoirState` or `NeighborTable`.

        Returns:
            ``"score"``, from the layer of the row to that of the column, and its standard error over rows ``"se"``,
            ``(*lead, l, l)`` float64; ``"duplicates"`` and ``"finite"``.

        Raises:
            ConfigError: Fewer than 2 rows, or than k + 2 where k is above 1.
        """
        least = LEAST if self.k == 1 else self.k + 2
        if int(state.n) < least:
            why = f" with k={self.k}" * (self.k > 1)
            raise ConfigError(f"got {int(state.n)} rows; information_imbalance{why} needs at least {least} samples")
        table = as_neighbors(state, self.derivation(state))
        facts = {"duplicates": table.duplicates, "finite": table.finite}
        if self.k == 1:
            return TensorDict({"score": table.imbalance, "se": table.imbalance_se, **facts})
        score, se = mean_terms(table, self.k, RanksElsewhere(self.k))
        return TensorDict({"score": score, "se": se, **facts})

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["score"][..., 0, 1], scores["score"][..., 1, 0]]


def _validate_inputs(x: Tensor, y: Tensor) -> None:
    """Refuse representations that do not hold the same samples, 2 at least.

    Raises:
        ConfigError: Shapes other than ``(*lead, n, d)`` with one ``lead`` and ``n``, n < 2, or two devices.
    """
    for name, value in (("x", x), ("y", y)):
        if value.ndim < 2:
            raise ConfigError(f"{name} has shape {tuple(value.shape)}; allowed are (N, D) and (..., N, D)")
    if x.shape[:-2] != y.shape[:-2]:
        raise ConfigError(f"x has leading dimensions {tuple(x.shape[:-2])} and y {tuple(y.shape[:-2])}; use the same")
    if x.shape[-2] != y.shape[-2]:
        raise ConfigError(f"x has {x.shape[-2]} samples and y {y.shape[-2]}; both need the same samples")
    if x.device != y.device:
        raise ConfigError(f"x is on {x.device} and y on {y.device}; move one of them")
    if x.shape[-2] < LEAST:
        raise ConfigError(f"got {x.shape[-2]} samples; information imbalance needs at least {LEAST}")


def _compute_ranks_from_dist(dist: Float[Tensor, "*lead n n"]) -> Float[Tensor, "*lead n n"]:
    """Rank the distances of each row: 0 for itself, 1 to n - 1 for the others, tied ones the mean of their places.

    It needs n x n numbers several times, and is here for small n and for checks; the estimator does without.
    """
    work = dist.double() if dist.dtype == torch.float64 else dist.float()
    n = work.shape[-1]
    work = work.masked_fill(torch.eye(n, dtype=torch.bool, device=dist.device), -torch.inf)
    ascending = work.sort(-1).values
    low = torch.searchsorted(ascending, work)
    high = torch.searchsorted(ascending, work, right=True)
    ranks = (low + high - 1).to(work.dtype) / 2
    return ranks.masked_fill(work.isnan(), torch.nan)


def _as_distance_input_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype for distances between samples of both: the promoted one, float32 at least."""
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _directional_imbalance(
    source_ranks: Float[Tensor, "*lead n n"], target_ranks: Float[Tensor, "*lead n n"]
) -> Float[Tensor, "*lead"]:
    """Return ``2 / n`` times the mean target rank of each row's nearest others, all that are tied for it."""
    n = source_ranks.shape[-1]
    others = ~torch.eye(n, dtype=torch.bool, device=source_ranks.device)
    source = source_ranks.masked_fill(~others, torch.inf)
    nearest = (source == source.amin(-1, keepdim=True)) & others
    target = target_ranks.double()
    return (2 / n * (torch.where(nearest, target, 0).sum(-1) / nearest.sum(-1)).mean(-1)).to(target_ranks.dtype)


def _information_imbalance(x: Tensor, y: Tensor, *, p: float) -> tuple[Tensor, Tensor]:
    """Return the imbalance from x to y and from y to x, ``(*lead,)`` each.

    Args:
        x: ``(*lead, n, d_x)``.
        y: ``(*lead, n, d_y)``.
        p: Order of the norm.
    """
    _validate_inputs(x, y)
    dtype = _as_distance_input_dtype(x, y)
    found = Neighbors(imbalance=True, p=p).of_rows([x.to(dtype), y.to(dtype)]).imbalance.to(dtype)
    return found[..., 0, 1], found[..., 1, 0]
