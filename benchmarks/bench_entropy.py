"""Entropy of a Gaussian mixture: against one broadcast over points, components, tokens and features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from benchmarks.peak import peak_mb
from tdprobe.latent.information.entropy import gaussian_mixture_entropy

BATCH, TOKENS, WIDTH = 16, 128, 576
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(batch: int, tokens: int, width: int) -> Inputs:
    """Draw clean and transformed embeddings, means, stds and a mask, with gradients for all but the mask."""
    g = torch.Generator().manual_seed(0)
    clean, transformed, means = (torch.randn(batch, tokens, width, generator=g) for _ in range(3))
    stds = torch.rand(batch, tokens, width, generator=g).add_(0.5)
    # Every eighth token is padding.
    mask = torch.arange(tokens).expand(batch, tokens) % 8 != 7
    return (*(x.requires_grad_() for x in (clean, transformed, means, stds)), mask)


def naive(clean: Tensor, transformed: Tensor, means: Tensor, stds: Tensor, mask: Tensor) -> Tensor:
    z = (transformed[:, None] - clean - means) / stds
    density = 0.5 * (z * z).sum(-1) + stds.log().sum(-1) + 0.5 * clean.shape[-1] * math.log(2 * math.pi)
    keep = mask[:, None].expand_as(density)
    return (density * keep).sum() / keep.sum()


def loop(*given: Tensor) -> Tensor:
    return gaussian_mixture_entropy(*given)


def matmul(*given: Tensor) -> Tensor:
    return gaussian_mixture_entropy(*given, method="matmul")


WAYS = {"naive": naive, "loop": loop, "matmul": matmul}


def forward(way: Callable[..., Tensor], given: Inputs) -> float:
    with torch.no_grad():
        return way(*given).item()


def backward(way: Callable[..., Tensor], given: Inputs) -> None:
    for x in given[:4]:
        x.grad = None
    way(*given).backward()


@bench(
    "entropy",
    f"Gaussian mixture entropy, {BATCH} points x {BATCH} components x {TOKENS} tokens x {WIDTH} features, "
    "against the broadcast",
    {
        "loop forward": Bar("gain", 4),
        "loop forward + backward": Bar("gain", 4),
        "matmul forward": Bar("gain"),
        "matmul forward + backward": Bar("gain"),
        "loop forward, memory": Bar("gain", 10),
        "loop forward + backward, memory": Bar("gain", 5),
        "matmul forward, memory": Bar("gain"),
        "matmul forward + backward, memory": Bar("gain"),
    },
)
def entropy(setup: Setup) -> dict[str, Measured]:
    sizes = (2, 4, 8) if setup.tiny else (BATCH, TOKENS, WIDTH)
    given = inputs(*sizes)
    rows = {}
    for label, run in (("forward", forward), ("forward + backward", backward)):
        times = interleave(
            {name: lambda way=way, run=run: run(way, given) for name, way in WAYS.items()}, setup.rounds, unit="ms"
        )
        peaks = {name: extra_mb(f"{name}_{run.__name__}", sizes) for name in WAYS}
        for name in ("loop", "matmul"):
            rows[f"{name} {label}"] = Measured(times[name], times["naive"], "ms")
            rows[f"{name} {label}, memory"] = Measured([peaks[name]], [peaks["naive"]], "MB")
    return rows


# Memory: each of these runs in a process of its own, on inputs of the given sizes.


def extra_mb(function: str, sizes: tuple[int, ...]) -> float:
    """Return how much more memory a call takes than its inputs do."""
    peaks = (peak_mb("benchmarks.bench_entropy", name, *sizes) for name in (function, "nothing"))
    # Toys take less than the kernel counts in.
    return max(next(peaks) - next(peaks), 0.1)


def warmed(*sizes: int) -> Inputs:
    """Draw inputs, after a toy that loads all code."""
    for way in WAYS.values():
        backward(way, inputs(2, 2, 2))
    return inputs(*sizes)


def nothing(*sizes: int) -> None:
    warmed(*sizes)


def naive_forward(*sizes: int) -> None:
    forward(naive, warmed(*sizes))


def naive_backward(*sizes: int) -> None:
    backward(naive, warmed(*sizes))


def loop_forward(*sizes: int) -> None:
    forward(loop, warmed(*sizes))


def loop_backward(*sizes: int) -> None:
    backward(loop, warmed(*sizes))


def matmul_forward(*sizes: int) -> None:
    forward(matmul, warmed(*sizes))


def matmul_backward(*sizes: int) -> None:
    backward(matmul, warmed(*sizes))
