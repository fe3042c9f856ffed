"""How large the noise of each feature is, and the noise itself."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError, StateError, unknown
from tdprobe.latent.information.noised_estimator import floored
from tdprobe.stats.hashing import mix64
from tdprobe.stats.state import centre, working_dtype
from tdprobe.stream.batch import Batch


@dataclass(frozen=True)
class NoiseLevels:
    """Standard deviation of every feature of every layer, and what noise is made of it.

    Attributes:
        stds: By layer, (features,) float64.
        noise: Noise in units of them.
        mus: Means by layer, to subtract before rows are compared; 0 where unknown.
        n: Rows behind them; ``None`` where unknown.
    """

    stds: Mapping[str, Tensor]
    noise: float
    mus: Mapping[str, Tensor] = field(default_factory=dict)
    n: int | None = None

    @classmethod
    def given(cls, stds: Mapping[str, Tensor], noise: float) -> NoiseLevels:
        """Take standard deviations from the user.

        Raises:
            ConfigError: They are no mapping to vectors of positive numbers.
        """
        if not isinstance(stds, Mapping):
            raise ConfigError(f"stds maps module names to (features,) tensors, got a {type(stds).__name__}")
        for name, std in stds.items():
            fits = isinstance(std, Tensor) and std.ndim == 1 and std.is_floating_point()
            if not fits or not bool(((std > 0) & std.isfinite()).all()):
                got = f"shape {tuple(std.shape)}" if isinstance(std, Tensor) else type(std).__name__
                raise ConfigError(f"stds[{name!r}] has {got}; it must be (features,), all finite and above 0")
        return cls({name: std.detach().double() for name, std in stds.items()}, noise)

    def of(self, name: str, rows: Tensor) -> Float[Tensor, " d"]:
        """Return the standard deviations of the noise of one layer, like its rows.

        Raises:
            ConfigError: The layer is unknown or has another width.
        """
        if name not in self.stds:
            raise ConfigError(unknown("layer among the standard deviations", name, self.stds))
        std = self.stds[name]
        if std.shape[0] != rows.shape[-1]:
            raise ConfigError(
                f"layer {name!r} has rows of width {rows.shape[-1]}, its standard deviations {std.shape[0]}; calibrate "
                "on the same kind of input"
            )
        return (self.noise * std).to(device=rows.device, dtype=wide(rows))

    def in_units(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return rows in units of the noise, around the mean of the calibration."""
        found = {}
        for name, x in rows.items():
            mu = self.mus[name].to(x.device, wide(x)) if name in self.mus else 0
            found[name] = (x.to(wide(x)) - mu) / self.of(name, x)
        return found


class FeatureMoments:
    """Count, mean and sum of squares of each feature of each layer, merged by Chan's formula."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[int, Tensor, Tensor]] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Take in rows of every layer."""
        for name, rows in batch.rows.items():
            if not batch.n:
                continue
            centred, mu = centre(rows, working_dtype([rows]))
            new = (batch.n, mu, centred.square().sum(0, dtype=torch.float64))
            known = self._parts.get(name)
            if known is not None and known[1].shape != mu.shape:
                raise ConfigError(
                    f"layer {name!r} gave rows of width {mu.shape[0]} after {known[1].shape[0]} in one calibration"
                )
            self._parts[name] = new if known is None else _merged(known, new)

    @torch.inference_mode(False)
    def levels(self, names: Sequence[str], noise: float) -> NoiseLevels:
        """Return the standard deviations of the layers.

        Raises:
            StateError: A layer gave fewer than two rows, or rows that are all the same, or not finite.
        """
        stds, mus = {}, {}
        for name in names:
            n, mu, squares = self._parts.get(name, (0, torch.zeros(0, device="cpu"), torch.zeros(0, device="cpu")))
            if n < 2:
                raise StateError(
                    f"the calibration saw {n} rows of {name!r}, and a standard deviation takes two or more; run texts "
                    "with tokens that tokens= and skip_first= leave, inside the calibrating() block"
                )
            std = (squares / n).sqrt()
            if not bool(std.isfinite().all()):
                raise StateError(f"{name!r} held NaN or infinite values in the calibration; leave that layer out")
            if not bool((std > 0).any()):
                raise StateError(
                    f"{name!r} gave the same row for every token of the calibration, so there is nothing to scale its "
                    "noise by; leave that layer out, or calibrate on more texts"
                )
            stds[name], mus[name] = floored(std), mu
        return NoiseLevels(stds, noise, mus, next(iter(self._parts.values()))[0])


def _merged(a: tuple[int, Tensor, Tensor], b: tuple[int, Tensor, Tensor]) -> tuple[int, Tensor, Tensor]:
    n, gap = a[0] + b[0], b[1] - a[1]
    return n, a[1] + gap * (b[0] / n), a[2] + b[2] + gap.square() * (a[0] * b[0] / n)


def wide(rows: Tensor) -> torch.dtype:
    """Return float64 for float64, float32 for all else."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def draw(rows: Tensor, seed: int, name: str, number: int, run: int) -> Float[Tensor, "n d"]:
    """Draw standard normal numbers like the rows; equal arguments give equal numbers, whatever was drawn before.

    Args:
        rows: (n, d), real.
        seed: The user's.
        name: Of the layer.
        number: Of the forward pass.
        run: Of the layer within the pass.

    Raises:
        ConfigError: The rows are integers, which take no noise.
    """
    if not rows.is_floating_point():
        raise ConfigError(f"noise is added to real numbers, and a layer gave {rows.dtype}; leave it out")
    key = torch.zeros((), dtype=torch.int64, device="cpu")
    for part in (seed, zlib.crc32(name.encode()), number, run):
        # Python's integers have no end; 63 bits are what a generator takes.
        key = mix64(key ^ (part & (2**63 - 1)))
    generator = torch.Generator(rows.device).manual_seed(int(key))
    return torch.randn(rows.shape, generator=generator, device=rows.device, dtype=wide(rows))
