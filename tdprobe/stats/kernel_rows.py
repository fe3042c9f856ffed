"""Kernel matrices of the rows of one layer, a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.errors import ConfigError, unknown
from tdprobe.stats.kernel_layer import SAMPLE, ascending, median, spaced
from tdprobe.stats.moments import unit_rows
from tdprobe.stats.state import centre

KERNELS = ("linear", "rbf")
# Rows of a block.
BLOCK = 256
# Squared distances below this share of the squared lengths are rounding: the rows are the same.
SAME = 1e-13
# A row this close to the mean, relative to the squared length of rows, has no direction.
NO_DIRECTION = 1e-24


def check_kernel(kernel: str, bandwidth: float) -> None:
    """Refuse kernels that do not exist.

    Raises:
        ConfigError: Another kernel than ``"linear"`` and ``"rbf"``, or a bandwidth that is not positive.
    """
    if kernel not in KERNELS:
        raise ConfigError(unknown("kernel", kernel, KERNELS))
    if not 0 < bandwidth < float("inf"):
        raise ConfigError(f"got bandwidth={bandwidth!r}; allowed are positive multiples of the median distance")


class KernelRows:
    """Hold the rows of one layer of one data set, and compute blocks of their kernel matrix in float64.

    ``"linear"`` is ``x.y``; ``"rbf"`` is ``exp(-|x - y|^2 / (2 s^2))``, with ``s`` the ``bandwidth`` times the median
    distance between rows that differ (of at most 1,024 rows, evenly spaced, as in `Kernel`), so that scaling a layer
    never matters.

    Args:
        rows: ``(n, d)`` real and finite.
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: In units of the median distance.
        center: Subtract the mean in the space of the kernel, which for the linear one is that of the columns.
        normalize_rows: Divide each row by its length before anything else.

    Attributes:
        power: Trace of the matrix before centring.
        diagonal: Diagonal of the matrix, ``(n,)`` float64.

    Example:
        >>> KernelRows(torch.tensor([[1.0], [3.0]]), center=True).block(torch.arange(2))
        tensor([[ 1., -1.],
                [-1.,  1.]], dtype=torch.float64)
    """

    def __init__(
        self,
        rows: Float[Tensor, "n d"],
        kernel: str = "linear",
        bandwidth: float = 1.0,
        *,
        center: bool = False,
        normalize_rows: bool = False,
    ) -> None:
        rows = unit_rows(rows) if normalize_rows else rows.double()
        self.linear = kernel == "linear"
        n = rows.shape[0]
        self.power = rows.square().sum() if self.linear else rows.new_tensor(float(n))
        # Distances do not change with the mean, but are exact only near it.
        self.rows = centre(rows, torch.float64)[0] if n and (center or not self.linear) else rows
        self.squares = self.rows.square().sum(1)
        self.means: Tensor | None = None
        if self.linear:
            self.diagonal = self.squares
            return
        self.sharpness = 0.5 / (bandwidth**2 * self._median())
        self.diagonal = torch.ones_like(self.squares)
        if center and n:
            self.means = torch.cat([self.block(part).mean(1) for part in self.parts()])
            self.diagonal = (self.diagonal - 2 * self.means + self.means.mean()).clamp(min=0)

    @property
    def n(self) -> int:
        """Count the rows."""
        return len(self.squares)

    @property
    def directed(self) -> Tensor:
        """Tell which rows have a direction in the space of the kernel, ``(n,)`` bool."""
        return self.diagonal > NO_DIRECTION * self.power / max(1, self.n)

    def parts(self) -> tuple[Tensor, ...]:
        """Cut the places of all rows into blocks."""
        return torch.arange(self.n, device=self.rows.device).split(BLOCK)

    def block(self, rows: Int[Tensor, "r"], columns: Int[Tensor, "c"] | None = None) -> Float[Tensor, "r c"]:
        """Return the kernel of some rows with some others, by default with all."""
        columns = torch.arange(self.n, device=self.rows.device) if columns is None else columns
        out = self.rows[rows] @ self.rows[columns].mT
        if self.linear:
            return out
        out.mul_(-2).add_(self.squares[rows].unsqueeze(1)).add_(self.squares[columns]).clamp_(min=0)
        out.mul_(-self.sharpness).exp_()
        out.masked_fill_(rows.unsqueeze(1) == columns, 1.0)
        if self.means is not None:
            out += self.means.mean() - self.means[rows].unsqueeze(1) - self.means[columns]
        return out

    def cosines(self, rows: Int[Tensor, "r"], columns: Int[Tensor, "c"] | None = None) -> Float[Tensor, "r c"]:
        """Return the block of the matrix that is scaled to a unit diagonal; rows without a direction give 0."""
        columns = torch.arange(self.n, device=self.rows.device) if columns is None else columns
        scale = torch.where(self.directed, self.diagonal, torch.inf).rsqrt()
        return self.block(rows, columns).mul_(scale[rows].unsqueeze(1)).mul_(scale[columns])

    def _median(self) -> Tensor:
        chosen = spaced(self.n, SAMPLE, self.rows.device)
        x, squares = self.rows[chosen], self.squares[chosen]
        total = squares.unsqueeze(1) + squares
        gaps = total - 2 * (x @ x.mT)
        gaps = gaps[(gaps > SAME * total).triu(1)]
        return self.power.new_tensor(median(ascending(gaps))) if len(gaps) else torch.ones_like(self.power)
