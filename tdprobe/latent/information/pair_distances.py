"""Distances of many points to many Gaussian components, without a table of (points, components, tokens, features)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tdprobe._types import Bool, Float
from tdprobe.stats.precision import float32_is_exact

# Below this share of the spread, squares and products of the expansion cancel to less than four digits in float32.
NARROW = 3e-2
Components = Iterator[tuple[int, Tensor, Tensor, Tensor]]


def half_squares(
    y: Float[Tensor, "b s e"],
    clean: Float[Tensor, "n s e"],
    means: Float[Tensor, "n s e"],
    stds: Float[Tensor, "n s e"],
    keep: Bool[Tensor, "b n s"],
    method: str,
) -> Float[Tensor, "b n s"]:
    """Return ``0.5 sum_e ((y - clean - means) / std)^2`` of every pair, and 0 where ``keep`` is false.

    What stands at positions that no kept pair uses changes neither value nor gradient, NaN included.

    Args:
        y: Points.
        clean: First part of the centres of the components.
        means: Second part.
        stds: Standard deviations of the components.
        keep: Pairs that count.
        method: ``"loop"`` over components, exact everywhere, or ``"matmul"``, the expansion of the square.
    """
    if method == "matmul" and keep.numel() and y.shape[-1]:
        return _expanded(y, clean, means, stds, keep)
    return _HalfSquares.apply(y, clean, means, stds, keep)


class _HalfSquares(torch.autograd.Function):
    """The loop: one buffer of the size of ``y``, filled anew for each component; gradients compute it again."""

    @staticmethod
    def forward(y: Tensor, clean: Tensor, means: Tensor, stds: Tensor, keep: Tensor) -> Tensor:
        table = y.new_empty(keep.shape)
        z = torch.empty_like(y, memory_format=torch.contiguous_format)
        y = _usable(y, keep)
        for place, x, mu, inverse in _components(clean, means, stds, keep):
            torch.sub(y, x, out=z).sub_(mu).mul_(inverse)
            table[:, place] = z.square_().sum(-1)
        return table.mul_(0.5).masked_fill_(~keep, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, clean, means, stds, keep = ctx.saved_tensors
        # With create_graph=True the gradient is differentiated in its turn, which forbids writing in place.
        gradients = _gradients if torch.is_grad_enabled() else _gradients_in_place
        components = _components(clean, means, stds, keep)
        grad_y, grad_centre, grad_std = gradients(_usable(y, keep), components, grads[0].masked_fill(~keep, 0))
        return grad_y, grad_centre, grad_centre, grad_std, None


def _usable(y: Tensor, keep: Tensor) -> Tensor:
    used = keep.any(1)
    return y if bool(used.all()) else y.masked_fill(~used.unsqueeze(-1), 0)


def _components(clean: Tensor, means: Tensor, stds: Tensor, keep: Tensor) -> Components:
    """Yield place, both parts of the centre and inverse standard deviations; where nothing is used, 0, 0 and 1.

    The parts are not added up: near its centre, a point less the first part is exact.
    """
    hole = ~keep.any(0).unsqueeze(-1)
    partial = bool(hole.any())
    for place in range(clean.shape[0]):
        x, mu, std = clean[place], means[place], stds[place]
        if partial:
            x, mu = x.masked_fill(hole[place], 0), mu.masked_fill(hole[place], 0)
            std = std.masked_fill(hole[place], 1)
        yield place, x, mu, std.reciprocal()


def _gradients_in_place(y: Tensor, components: Components, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, weighted = torch.empty((2, *y.shape), dtype=y.dtype, device=y.device)
    grad_y = torch.zeros_like(z)
    grad_centre, grad_std = torch.empty((2, grad.shape[1], *y.shape[1:]), dtype=y.dtype, device=y.device)
    for place, x, mu, inverse in components:
        torch.sub(y, x, out=z).sub_(mu).mul_(inverse)
        torch.mul(z, grad[:, place].unsqueeze(-1), out=weighted)
        torch.sum(weighted, 0, out=grad_centre[place]).mul_(inverse).neg_()
        torch.sum(z.mul_(weighted), 0, out=grad_std[place]).mul_(inverse).neg_()
        grad_y.addcmul_(weighted, inverse)
    return grad_y, grad_centre, grad_std


def _gradients(y: Tensor, components: Components, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, grad_centre, grad_std = torch.zeros_like(y), [], []
    for place, x, mu, inverse in components:
        z = (y - x - mu) * inverse
        weighted = z * grad[:, place].unsqueeze(-1)
        grad_y = grad_y + weighted * inverse
        grad_centre.append(-weighted.sum(0) * inverse)
        grad_std.append(-(weighted * z).sum(0) * inverse)
    return grad_y, torch.stack(grad_centre), torch.stack(grad_std)


def _expanded(y: Tensor, clean: Tensor, means: Tensor, stds: Tensor, keep: Tensor) -> Tensor:
    dtype, points, components = y.dtype, keep.any(1).unsqueeze(-1), keep.any(0).unsqueeze(-1)
    y, stds = y.masked_fill(~points, 0), stds.masked_fill(~components, 1)
    clean, means = clean.masked_fill(~components, 0), means.masked_fill(~components, 0)
    with torch.no_grad():
        # Distances do not depend on the origin, so that it needs no gradient; the digits do.
        origin = (clean + means).sum(0) / components.sum(0).clamp(min=1)
        spread = torch.maximum((y - origin).abs().mul_(points).max(), (clean + means - origin).abs().max())
        narrow = not bool(stds.min() > NARROW * spread) or not float32_is_exact(y.device)
    if narrow:
        y, clean, means, stds = y.double(), clean.double(), means.double(), stds.double()
    y, centre = y - origin, clean - origin + means
    precision = stds.square().reciprocal()
    # One product per token: (s, b, e) x (s, e, n).
    squares = _products(y.square(), precision) - 2 * _products(y, centre * precision)
    squares = squares + (centre.square() * precision).sum(-1)
    return (0.5 * squares).masked_fill(~keep, 0).to(dtype)


def _products(y: Tensor, components: Tensor) -> Tensor:
    return (y.transpose(0, 1) @ components.permute(1, 2, 0)).permute(1, 2, 0)


class _LogVolume(torch.autograd.Function):
    @staticmethod
    def forward(stds: Tensor, keep: Tensor) -> Tensor:
        volume = stds.new_empty(keep.shape)
        for row, (std, kept) in enumerate(zip(stds, keep, strict=True)):
            volume[row] = std.masked_fill(~kept.unsqueeze(-1), 1).log_().sum(-1)
        return volume

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stds, keep = ctx.saved_tensors
        hole = ~keep.unsqueeze(-1)
        return (grads[0].unsqueeze(-1) / stds.masked_fill(hole, 1)).masked_fill(hole, 0), None


def log_volume(stds: Float[Tensor, "n s e"], keep: Bool[Tensor, "n s"]) -> Float[Tensor, "n s"]:
    """Return ``sum_e log std`` of every token, and 0 where ``keep`` is false; only the input is saved for gradients."""
    return _LogVolume.apply(stds, keep)
