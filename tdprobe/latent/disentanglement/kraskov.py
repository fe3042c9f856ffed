"""Mutual information of two continuous variables by counting neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from tdprobe._types import Float, Int
from tdprobe.latent.disentanglement.columns import EQUAL, Columns, digamma_table, inside, nearest_in_line
from tdprobe.latent.disentanglement.radii import Chosen, Plane, Range, radii, taken

# Numbers in a tensor of one chunk: few enough for the cache of a processor; a graphics card takes more.
CHUNK = {"cpu": 2**16}
LARGE_CHUNK = 2**23
# From this share of unclear samples on, measuring all again is faster.
MANY = 1 / 8


def kraskov(x: Columns, y: Columns, k: int) -> Float[Tensor, "c m"]:
    """Estimate the mutual information of every latent with every attribute, in nats.

    With ``r_i`` the distance of sample i to its k-th neighbour in the maximum norm of both axes, in their standard
    deviations, and ``n_x``, ``n_y`` the numbers of samples closer than that along one axis, itself included,
    ``I = psi(n) + psi(k) - mean_i(psi(n_x) + psi(n_y))``, 0 at least.

    Where values repeat, ``psi(k)`` becomes psi of the number of samples in the box that is counted: it is closed
    where ``r_i = 0``, which gives the estimate of a contingency table, and otherwise open along the axis
    on which the k-th neighbour lies on the border; where neighbours lie on both, the two boxes are averaged. Nothing
    depends on the order of the rows, and rounding decides nothing.

    Args:
        x: Latents, c columns.
        y: Attributes, m columns.
        k: Neighbours, fewer than samples.

    References:
        Kraskov, Stögbauer, Grassberger 2004, Estimating mutual information (first estimator).
    """
    n = x.values.shape[-1]
    digamma = digamma_table(n, x.values.device)
    budget = CHUNK.get(x.values.device.type, LARGE_CHUNK)
    columns = max(1, min(len(y.values), budget // n))
    latents = max(1, budget // (n * columns))
    rows = []
    for left in range(0, len(x.values), latents):
        part = x[left : left + latents]
        ends = range(0, len(y.values), columns)
        terms = [_terms(Plane(part, y[end : end + columns]), k, digamma).mean(-1) for end in ends]
        rows.append(torch.cat(terms, -1))
    return (digamma[n] + torch.cat(rows)).clamp_(min=0)


def _terms(plane: Plane, k: int, digamma: Tensor) -> Float[Tensor, "c m n"]:
    """Count in whole numbers, and again where rounding may have made a difference."""
    radius, terms, flat = _counted(plane.rounded, k, digamma)
    if len(flat) > MANY * terms.numel():
        radius, terms, flat = _counted(plane, k, digamma)
    else:
        radius = Chosen(plane, flat).radii(plane.unrounded(radius, flat), k)
    terms.view(-1)[flat] = _resolved(plane, flat, radius, digamma)
    return terms


def _counted(plane: Plane, k: int, digamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count what is clearly nearer than the k-th neighbour; return radii and places of samples where more may be."""
    radius = radii(plane, k)
    inner, outer = plane.border(radius)
    ranges = plane.near(inner)
    (x_first, x_end), (y_first, y_end) = ranges
    terms = digamma[k] - digamma[x_end - x_first] - digamma[y_end - y_first]
    unclear = (_borders(plane, outer, *ranges) != 1) | (inner <= 0)
    flat = unclear.view(-1).nonzero().squeeze(-1)
    return radius.view(-1)[flat], terms, flat


def _copies(plane: Plane, digamma: Tensor) -> Float[Tensor, "c m n"]:
    """Count samples with the same values."""
    groups = plane.y.group.unsqueeze(0).expand(plane.places.shape).gather(-1, plane.places)
    counts = plane.y.copies.unsqueeze(0).expand(plane.places.shape).gather(-1, plane.places)
    n = groups.shape[-1]
    pair = torch.arange(groups[..., 0].numel(), device=groups.device).view(*groups.shape[:2], 1)
    cell = (pair * n + plane.x.group.unsqueeze(1)) * n + groups
    _, where, both = cell.unique(return_inverse=True, return_counts=True)
    return digamma[both[where]] - digamma[plane.x.copies].unsqueeze(1) - digamma[counts]


def _borders(plane: Plane, radius: Tensor, x: Range, y: Range) -> Int[Tensor, "c m n"]:
    """Count the values beyond ranges but within a radius, of which there is one in general; up to two at each end."""
    found = torch.zeros_like(x[0])
    c, m, n = radius.shape
    latent, attribute = (torch.arange(size, dtype=found.dtype, device=found.device) for size in (c, m))
    sides = (
        (plane.x, latent.view(c, 1, 1), plane.along, 1, x),
        (plane.y, attribute.view(m, 1), plane.across, plane.factor, y),
    )
    for columns, column, centre, factor, (first, end) in sides:
        for place in (first - 2, first - 1, end, end + 1):
            at = column * n + place.clamp(0, n - 1)
            distance = taken(columns.values, at).sub_(centre).abs_().mul_(factor)
            found += (place >= 0) & (place < n) & (distance <= radius)
    return found


def _resolved(plane: Plane, flat: Tensor, radius: Tensor, digamma: Tensor) -> Float[Tensor, " q"]:
    """Count copies where the radius is 0, and in half-open boxes where several neighbours may lie on the border."""
    terms = torch.empty_like(radius)
    zero = radius == 0
    if bool(zero.any()):
        terms[zero] = _copies(plane, digamma).view(-1)[flat[zero]]
    terms[~zero] = _half_open(Chosen(plane, flat[~zero]), radius[~zero], digamma)
    return terms


def _half_open(chosen: Chosen, radius: Tensor, digamma: Tensor) -> Float[Tensor, " q"]:
    closed = chosen.ranges(radius, closed=True)
    open_x, open_y, closed_x, closed_y = (digamma[end - first] for first, end in (*chosen.ranges(radius), *closed))
    terms = torch.empty_like(radius)
    for rows, dx, dy in chosen.blocks(closed):
        r = radius[rows].unsqueeze(-1)
        in_x, in_y = dx < r * (1 - EQUAL), dy < r * (1 - EQUAL)
        near = torch.maximum(dx, dy) <= r * (1 + EQUAL)
        beside_x = digamma[(in_x & near).sum(-1)] - open_x[rows] - closed_y[rows]
        beside_y = digamma[(in_y & near).sum(-1)] - open_y[rows] - closed_x[rows]
        at_x, at_y = near & ~in_x, near & ~in_y
        both = torch.where(at_y.any(-1), (beside_x + beside_y) / 2, beside_x)
        terms[rows] = torch.where(at_x.any(-1), both, beside_y)
    return terms


def kraskov_entropy(x: Columns, k: int) -> Float[Tensor, " c"]:
    """Estimate what the estimator says of a variable and itself: ``psi(n) - mean_i psi(n_i)``.

    ``n_i`` samples, itself included, are at most as far away as the k-th neighbour: k + 1 without repeated values.
    It grows like the logarithm of n, for a continuous variable has infinitely many values.
    """
    values = x.values
    n = values.shape[-1]
    digamma = digamma_table(n, values.device)
    radius = nearest_in_line(values, k, k, torch.zeros_like(x.order))
    column = torch.arange(len(values), device=values.device).unsqueeze(-1)
    first, end = inside(x.padded, column, values, radius, closed=True)
    return digamma[n] - digamma[end - first].mean(-1)
