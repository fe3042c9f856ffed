"""Principal axes of every layer, and the products of all layer pairs seen along them, for all measures at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tdprobe._types import Bool, Float
from tdprobe.stats.cross_state import CrossState
from tdprobe.stats.state import Derivation

# Bytes for the products of the pairs that are looked at together.
BUDGET = 64 * 2**20
# Rounding of the decompositions.
EPSILON = torch.finfo(torch.float64).eps
# Variance relative to the mean square that counts as none.
CONSTANT = 1e-12


class Axes(NamedTuple):
    """Principal axes of some layers of one width, with any leading dimensions ``*s``.

    Attributes:
        n: Rows.
        total: Sum of the variances of all columns, ``(*s,)`` float64.
        variances: Variance along each axis, descending, ``(*s, d)`` float64; 0 where it is rounding.
        vectors: The axes, as columns, ``(*s, d, d)`` float64.
    """

    n: int
    total: Tensor
    variances: Tensor
    vectors: Tensor

    @property
    def rank(self) -> Float[Tensor, "*s"]:
        """Number of axes that have any variance."""
        return (self.variances > 0).sum(-1).double()


class PairMeasure(ABC):
    """Say what to make of the covariance of two layers; a hashable value, and the formula of a measure.

    Attributes:
        of_itself: Value of any layer with itself, where that is certain: the formula may leave rounding there.
    """

    of_itself: ClassVar[float | None] = None

    @abstractmethod
    def __call__(
        self, covariance: Float[Tensor, "*s p q"], a: Axes, b: Axes
    ) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
        """Measure some pairs, from the first to the second layer and back.

        Args:
            covariance: ``A' cov(x, y) B``, the covariance along the axes ``A`` and ``B`` of the two layers.
            a: The first layer.
            b: The second layers.
        """

    @property
    def along_axes(self) -> bool:
        """Tell whether axes are needed; otherwise the covariance may be that of the columns, without any axes."""
        return True


@dataclass(frozen=True)
class PairTable:
    """Hold what `PairMeasures` worked out.

    Attributes:
        n: Rows.
        values: By measure, from the layer of the row to that of the column, ``(*lead, l, l)`` float64; NaN for layers
            without variance.
        finite: Whether a layer holds finite numbers only, ``(*lead, l)`` bool.
    """

    n: Tensor
    values: dict[PairMeasure, Tensor]
    finite: Tensor


@dataclass(frozen=True)
class PairMeasures(Derivation):
    """Work out several measures of all layer pairs from one `CrossState`.

    One eigendecomposition for each layer; then the products of a layer with all others are turned onto the axes,
    measured and dropped, some pairs at a time. Axes whose variance is below the rounding of the products count as
    none.

    Args:
        measures: What to measure.
    """

    measures: tuple[PairMeasure, ...]

    def joined(self, other: Any) -> PairMeasures | None:
        """Return what takes the measures of both."""
        if not isinstance(other, PairMeasures):
            return None
        return PairMeasures(tuple(dict.fromkeys([*self.measures, *other.measures])))

    def __call__(self, state: CrossState) -> PairTable:
        """Measure all pairs."""
        with torch.inference_mode(False), torch.no_grad():
            spread = state.spread
            usable = spread > CONSTANT * state.power
            usable &= spread.isfinite()
            values = self._pairs(state, usable)
        keep = usable.unsqueeze(-1) & usable.unsqueeze(-2)
        values = {measure: torch.where(keep, found, torch.nan) for measure, found in values.items()}
        return PairTable(n=state.n, values=values, finite=spread.isfinite())

    def _pairs(self, state: CrossState, usable: Bool[Tensor, "*lead l"]) -> dict[PairMeasure, Tensor]:
        layers, n = len(state.columns), max(1, int(state.n))
        find = _axes if any(measure.along_axes for measure in self.measures) else _columns
        scatters = [_masked(state.block(i, i), usable[..., i]) for i in range(layers)]
        axes = [find(scatter / n, n, float(state.precision)) for scatter in scatters]
        values = {measure: torch.full_like(usable, torch.nan, dtype=torch.float64) for measure in self.measures}
        values = {measure: x.unsqueeze(-1).repeat_interleave(layers, -1) for measure, x in values.items()}
        for i, others in _together(state.columns, usable[..., 0].numel()):
            blocks = [_masked(state.block(i, j), usable[..., i] & usable[..., j]) / n for j in others]
            b = Axes(n, *(torch.stack([axes[j][part] for j in others]) for part in (1, 2, 3)))
            turned = torch.stack(blocks)
            turned = axes[i].vectors.mT @ turned @ b.vectors if b.vectors.numel() else turned
            a = Axes(n, *(x.expand(len(others), *x.shape) for x in axes[i][1:]))
            for measure in self.measures:
                there, back = measure(turned, a, b)
                values[measure][..., i, others] = there.movedim(0, -1)
                values[measure][..., others, i] = back.movedim(0, -1)
        for measure, found in values.items():
            if measure.of_itself is not None:
                found.diagonal(dim1=-2, dim2=-1).fill_(measure.of_itself)
        return values


def _masked(block: Tensor, usable: Tensor) -> Tensor:
    # Decompositions refuse NaN, and those of a data set must not take the others along.
    return torch.where(usable[..., None, None], block, 0.0)


def _together(columns: Sequence[int], data_sets: int) -> Iterator[tuple[int, list[int]]]:
    """Yield a layer, and itself and later ones of one width, as many as fit into memory together."""
    for i, width in enumerate(columns):
        for other in dict.fromkeys(columns[i:]):
            places = [j for j in range(i, len(columns)) if columns[j] == other]
            size = max(1, BUDGET // (8 * width * other * data_sets))
            yield from ((i, places[start : start + size]) for start in range(0, len(places), size))


def _axes(covariance: Float[Tensor, "*lead d d"], n: int, precision: float) -> Axes:
    variances, vectors = torch.linalg.eigh(covariance)
    variances, vectors = variances.flip(-1), vectors.flip(-1)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    # Whitening would take noise for structure. Products round relative to the columns in them, so that a few massive
    # columns leave axes of others as they are; the decomposition relative to the largest axis.
    rounding = (vectors.square() * diagonal.unsqueeze(-1)).sum(-2)
    least = variances.shape[-1] ** 0.5 * (4 * precision * rounding + EPSILON * variances[..., :1])
    total = diagonal.sum(-1)
    return Axes(n, total, torch.where(variances > least, variances, 0.0), vectors)


def _columns(covariance: Float[Tensor, "*lead d d"], n: int, precision: float) -> Axes:
    none = covariance[..., :0]
    return Axes(n, covariance.diagonal(dim1=-2, dim2=-1).sum(-1), none[..., 0, :], none)


def weighted(covariance: Float[Tensor, "*s p q"], left: Float[Tensor, "*s p"], right: Float[Tensor, "*s q"]) -> Tensor:
    """Weigh axes on both sides, and leave out those at the end that weigh nothing anywhere."""
    p, q = (1 + max([0, *(w > 0).flatten(0, -2).any(0).nonzero().flatten().tolist()]) for w in (left, right))
    return left[..., :p].unsqueeze(-1) * covariance[..., :p, :q] * right[..., :q].unsqueeze(-2)


def svd(matrix: Float[Tensor, "*s p q"]) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix into ``U``, singular values in descending order, and ``V'``."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        # The solver gives up on many equal values, such as the correlations of fewer rows than columns; the symmetric
        # one does not. It knows small values to half of the digits.
        if matrix.shape[-2] > matrix.shape[-1]:
            v, values, u = svd(matrix.mT)
            return u.mT, values, v.mT
        squares, u = torch.linalg.eigh(matrix @ matrix.mT)
        values, u = squares.flip(-1).clamp(min=0).sqrt(), u.flip(-1)
        v = matrix.mT @ u / values.clamp(min=torch.finfo(matrix.dtype).tiny).unsqueeze(-2)
        return u, values, v.mT
