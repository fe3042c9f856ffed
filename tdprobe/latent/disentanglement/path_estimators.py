"""Smoothness and monotonicity as estimators: samples along paths on which units of a layer move."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import UnraveledKey
from tdprobe.errors import ConfigError
from tdprobe.estimator import SupervisedEstimator
from tdprobe.latent.disentanglement.path_measures import Monotone, Smooth
from tdprobe.registry import Spec, register
from tdprobe.stats.paths import PathMeasure, Paths, PathsState

REFERENCE = "Watcharasupat 2021, Controllable music: supervised learning of disentangled representations"


class _PathEstimator(SupervisedEstimator):
    """Measure paths: the mean over all paths on which the unit of an attribute moves in every step.

    Args:
        measure: What is measured along a path.
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        path_key: Key of the number of the path of each row.
        out_key: Key to write, ``(*lead, m)`` float32.
        reg_dim: Unit of each attribute; by default 0, 1, ..., m - 1.
        gap: Rows without one of its own after which a path is over.
    """

    def __init__(
        self, measure: PathMeasure, in_key: Any, attributes: Any, path_key: Any, out_key: Any, reg_dim: Any, gap: int
    ) -> None:
        keys = [attributes] if isinstance(attributes, UnraveledKey) else list(attributes)
        super().__init__([in_key, *keys, path_key], [out_key])
        self.in_key, self.attributes, self.path_key, self.out_key = in_key, attributes, path_key, out_key
        self.reg_dim, self.gap = reg_dim, gap
        units = None if reg_dim is None else _units(reg_dim)
        self._paths = Paths(measure, units, len(keys), gap)

    def statistic(self) -> Paths:
        """Return `Paths`."""
        return self._paths

    def target_names(self, count: int) -> tuple[str, ...]:
        """Name the attributes, for tables: by their keys where there is one key for each."""
        keys = tuple(map(str, self.target_keys[:-1]))
        return keys if len(keys) == count else tuple(f"{keys[0]}[{place}]" for place in range(count))

    def score(self, state: PathsState) -> TensorDict:
        """Score each layer.

        Returns:
            ``"score"``, ``(*lead, l, m)`` float64, NaN for an attribute without any path, with a warning, and for
            layers that are not finite; ``"se"``, the standard error of this mean; ``"finite"``.
        """
        ended = self._paths.finished(state)
        finite = ended.odd == 0
        score = (ended.total / ended.count).masked_fill(~finite.unsqueeze(-1), math.nan)
        # Of two paths or more: 0 / 0 otherwise.
        spread = (ended.squares - ended.total * score).clamp(min=0) / (ended.count - 1).clamp(min=0)
        bad = (score.isnan() & finite.unsqueeze(-1)).flatten(0, -2).any(0).nonzero().squeeze(-1).tolist()
        if bad:
            names = self.target_names(score.shape[-1])
            warnings.warn(
                f"{self.spec.name}: {', '.join(repr(names[i]) for i in bad)} is NaN in some layer, for on no path of "
                f"{self._paths.measure.least} rows or more its unit moves in every step, and it changes",
                stacklevel=2,
            )
        return TensorDict({"score": score, "se": (spread / ended.count).sqrt(), "finite": finite})


@register(
    Spec(
        name="smoothness",
        kind="supervised",
        symmetric=False,
        bounds=(0.0, 1.0),
        larger_means="attributes that follow their unit without bends",
        invariant_to=frozenset({"isotropic scaling", "translation"}),
        needs=("paths",),
        cost="n m",
        reference=REFERENCE,
    )
)
class SmoothnessEstimator(_PathEstimator):
    """Score how smoothly an attribute changes while its unit moves, see `smoothness`.

    Rows are samples along paths, such as the traversal of one unit from many starting points. Rows of one path come in
    order; those of other paths may stand between them. `LayerScoring` reads attributes and the number of the path
    from each call, ``hooked(z, attributes=a, path=numbers)``; a path may go on in the next call. A path counts for an
    attribute if its unit moves in every step, so that each attribute may have paths of its own.

    Args:
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        path_key: Key of the number of the path of each row, ``(*lead, n)``, the same in all data sets.
        out_key: Key to write, ``(*lead, m)`` float32: the mean over paths.
        reg_dim: Unit of each attribute; by default 0, 1, ..., m - 1.
        max_mode: ``"lehmer"`` or ``"naive"``, see `smoothness`.
        ptp_mode: ``"naive"`` or a share, see `smoothness`.
        clamp: Move the score of each path into [0, 1].
        p: Power of the Lehmer mean, above 1.
        gap: Rows without one of its own after which a path is over, and only its score is kept.

    Example:
        >>> import torch
        >>> z = torch.linspace(-1, 1, 9).repeat(2).unsqueeze(1)
        >>> td = TensorDict({"latents": z, "attributes": z**2, "path": torch.arange(18) // 9})
        >>> SmoothnessEstimator()(td)["smoothness"]  # second differences of a parabola are a seventh of the range
        tensor([0.8571])

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """

    def __init__(
        self,
        in_key: Any = "latents",
        attributes: Any = "attributes",
        path_key: Any = "path",
        out_key: Any = "smoothness",
        reg_dim: Any = None,
        *,
        max_mode: str = "lehmer",
        ptp_mode: float | str = "naive",
        clamp: bool = False,
        p: float = 2.0,
        gap: int = 4096,
    ) -> None:
        measure = Smooth(max_mode, ptp_mode, clamp, p)
        super().__init__(measure, in_key, attributes, path_key, out_key, reg_dim, gap)
        self.max_mode, self.ptp_mode, self.clamp, self.p = max_mode, ptp_mode, clamp, p


@register(
    Spec(
        name="monotonicity",
        kind="supervised",
        symmetric=False,
        bounds=(-1.0, 1.0),
        larger_means="attributes that grow with their unit",
        invariant_to=frozenset({"translation"}),
        needs=("paths",),
        cost="n m",
        reference=REFERENCE,
    )
)
class MonotonicityEstimator(_PathEstimator):
    """Score how consistently an attribute grows, or falls, while its unit moves, see `monotonicity`.

    Rows are samples along paths, as for `SmoothnessEstimator`. Paths on which the attribute does not change count if
    ``degenerate_val`` is a number.

    Args:
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        path_key: Key of the number of the path of each row, ``(*lead, n)``, the same in all data sets.
        out_key: Key to write, ``(*lead, m)`` float32: the mean over paths.
        reg_dim: Unit of each attribute; by default 0, 1, ..., m - 1.
        liad_thresh: Smaller changes per unit count as noise.
        degenerate_val: Value of a path where every change is noise; NaN leaves it out.
        gap: Rows without one of its own after which a path is over, and only its score is kept.

    Example:
        >>> import torch
        >>> z = torch.linspace(-2, 2, 5).unsqueeze(1)
        >>> td = TensorDict({"latents": z.repeat(1, 2), "attributes": torch.cat([-z, z**2], 1), "path": torch.zeros(5)})
        >>> MonotonicityEstimator()(td)["monotonicity"]
        tensor([-1.,  0.])

    References:
        Watcharasupat 2021, Controllable music: supervised learning of disentangled representations for music
        generation.
    """

    def __init__(
        self,
        in_key: Any = "latents",
        attributes: Any = "attributes",
        path_key: Any = "path",
        out_key: Any = "monotonicity",
        reg_dim: Any = None,
        *,
        liad_thresh: float = 1e-3,
        degenerate_val: float = math.nan,
        gap: int = 4096,
    ) -> None:
        measure = Monotone(liad_thresh, None if math.isnan(degenerate_val) else degenerate_val)
        super().__init__(measure, in_key, attributes, path_key, out_key, reg_dim, gap)
        self.liad_thresh, self.degenerate_val = liad_thresh, degenerate_val


def _units(reg_dim: Any) -> tuple[int, ...]:
    found = np.asarray(reg_dim.cpu() if isinstance(reg_dim, Tensor) else reg_dim)
    several = found.ndim == 1 and found.size > 0 and found.dtype.kind in "iu"
    if not several or len(set(found.tolist())) < len(found) or found.min() < 0:
        raise ConfigError(f"got reg_dim={reg_dim!r}; allowed are different units from 0 on, one for each attribute")
    return tuple(found.tolist())
