"""The gaps of the MIG family, from a matrix of mutual information."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdprobe._types import Bool, Float, Int
from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.disentanglement.information import Information, information

NORMALIZERS = ("ksg", "binned", "none")
# Entropies below this share of what could be there are rounding.
TINY = 1e-9


@dataclass(frozen=True)
class Gaps:
    """Hold what the four gaps are made of.

    Args:
        information: Estimates among attributes.
        matrix: Mutual information ``(f, m)`` of latents and attributes.
        reg_dim: The latent dimension of each attribute, or ``None``.
        normalize: Whether gaps are divided by entropies.
    """

    information: Information
    matrix: Tensor
    reg_dim: tuple[int, ...] | None
    normalize: bool

    def mig(self) -> Float[Tensor, " m"]:
        """Divide the gap between two latents by the entropy."""
        return self._over(latent_gap(self.matrix, self.reg_dim), self._entropy)

    def xmig(self) -> Float[Tensor, " m"]:
        """Divide the gap to the latents that belong to no attribute by the entropy."""
        return self._over(self._own - self.matrix[self._free].amax(0), self._entropy)

    def dmig(self) -> Float[Tensor, " m"]:
        """Divide the gap by the entropy that is left when the attribute of the other latent is known."""
        m = len(self._dims)
        # The latent of attribute i in place i, then those of none: which of equal ones counts is not up to their order.
        ordered = self.matrix[torch.cat([self._dims, self._free.nonzero().squeeze(-1)])]
        best, place = _best_other(ordered, torch.arange(m, device=self.matrix.device))
        pairs = [(i, other) for i, other in enumerate(place.tolist()) if other < m]
        return self._over(self._own - best, lambda: self._conditional(pairs))

    def dlig(self) -> Float[Tensor, " m"]:
        """Divide the gap between two attributes by the entropy that is left when the other is known."""
        own = torch.arange(len(self._dims), device=self.matrix.device)
        best, other = _best_other(self.matrix[self._dims].mT, own)
        pairs = list(enumerate(other.tolist()))
        return self._over(self._own - best, lambda: self._conditional(pairs))

    @property
    def _dims(self) -> Int[Tensor, " m"]:
        return torch.tensor(self.reg_dim, device=self.matrix.device)

    @property
    def _free(self) -> Bool[Tensor, " f"]:
        free = torch.ones(len(self.matrix), dtype=torch.bool, device=self.matrix.device)
        free[self._dims] = False
        return free

    @property
    def _own(self) -> Float[Tensor, " m"]:
        return self.matrix[self._dims].diagonal()

    def _entropy(self) -> Float[Tensor, " m"]:
        found = self.information.entropy
        return torch.where(found > TINY, found, torch.nan)

    def _conditional(self, pairs: Sequence[tuple[int, int]]) -> Float[Tensor, " m"]:
        """Return H(a_i | a_l) for the pairs (i, l), H(a_i) for the others."""
        whole = self._entropy()
        left, shared = whole.clone(), self.information.between(pairs)
        for i, other in pairs:
            left[i] -= shared[i, other]
        return torch.where(left > TINY * whole, left, torch.nan)

    def _over(self, gap: Tensor, entropy: Callable[[], Tensor]) -> Tensor:
        return gap / entropy() if self.normalize else gap


def latent_gap(matrix: Float[Tensor, "f m"], reg_dim: Sequence[int] | None) -> Float[Tensor, " m"]:
    """Subtract the second largest value of each column from the largest, or the best other from that in ``reg_dim``."""
    if reg_dim is None:
        first, second = matrix.topk(2, 0).values
        return first - second
    dims = torch.tensor(reg_dim, device=matrix.device)
    return matrix[dims].diagonal() - _best_other(matrix, dims)[0]


def _best_other(matrix: Float[Tensor, "f m"], dims: Int[Tensor, " m"]) -> tuple[Tensor, Tensor]:
    """Find the largest value of each column outside of one row; of equal ones the last."""
    others = matrix.scatter(0, dims.unsqueeze(0), -torch.inf)
    best, place = others.flip(0).max(0)
    return best, len(matrix) - 1 - place


def gaps(
    z: Tensor, a: Tensor, discrete: Sequence[bool], reg_dim: tuple[int, ...] | None, normalizer: str, k: int
) -> Gaps:
    """Work out the matrix of mutual information that the four gaps share.

    Args:
        z: ``(n, f)`` float64.
        a: ``(n, m)`` float64, classes numbered 0, 1, ...
        discrete: Which attributes are discrete.
        reg_dim: The latent dimension of each attribute, or ``None``.
        normalizer: One of `NORMALIZERS`.
        k: Neighbours.

    Raises:
        ConfigError: No such normalizer.
    """
    check_normalizer(normalizer)
    known = information(a, discrete, normalizer == "binned", k)
    return Gaps(known, known.latent(z), reg_dim, normalizer != "none")


def best_dims(matrix: Float[Tensor, "f m"]) -> tuple[int, ...]:
    """Give every attribute a latent of its own: the largest entry of the matrix first, then the largest of the rest."""
    left, found = matrix.clone(), [0] * matrix.shape[1]
    for _ in found:
        d, i = divmod(int(left.argmax()), left.shape[1])
        found[i] = d
        left[d], left[:, i] = -torch.inf, -torch.inf
    return tuple(found)


def check_normalizer(normalizer: str) -> None:
    """Refuse what is no normalizer.

    Raises:
        ConfigError: It is none.
    """
    if normalizer not in NORMALIZERS:
        raise ConfigError(unknown("normalizer", str(normalizer), NORMALIZERS))
