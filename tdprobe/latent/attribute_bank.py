"""What estimators of attributes and labels have in common: a bank of rows of the layers and of the targets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float, UnraveledKey
from tdprobe.errors import ConfigError
from tdprobe.estimator import SupervisedEstimator
from tdprobe.latent.attribute_inputs import K, classes, flags_of
from tdprobe.stats.reservoir import Reservoir, ReservoirState
from tdprobe.stats.state import Statistic, layer_list
from tdprobe.stream.batch import Batch


def by_layer(
    state: ReservoirState,
    targets: int,
    discrete: bool | tuple[bool, ...],
    prepare: Callable[[Tensor, tuple[bool, ...]], Any],
    work: Callable[[Tensor, Any], Any],
) -> tuple[tuple[Any, ...], ...]:
    """Do some work for each layer (outside) and data set (inside); ``None`` for layers that are not finite.

    Args:
        state: A bank of the rows of layers, then of targets.
        targets: How many targets there are.
        discrete: Which attributes are discrete.
        prepare: What to make of the attributes of a data set, ``(n, m)``, for all layers.
        work: What to make of a layer, ``(n, d)``, and that.

    Raises:
        ConfigError: Fewer rows than 4, attributes that are not finite, or labels that are no integers.
    """
    held = layer_list(state.rows)
    layers, a = held[:-targets], torch.cat([y.double() for y in held[-targets:]], -1)
    if int(state.n) <= K:
        raise ConfigError(f"got {int(state.n)} rows; attributes are scored with {K + 1} rows or more")
    flags = flags_of(discrete, a.shape[-1])
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        indices = list(product(*map(range, a.shape[:-2])))
        known = [prepare(classes(_finite(a[index]), flags), flags) for index in indices]
        return tuple(
            tuple(_worked(x[index].to(a.device), item, work) for index, item in zip(indices, known, strict=True))
            for x in layers
        )


def _worked(x: Tensor, known: Any, work: Callable[[Tensor, Any], Any]) -> Any:
    return work(x.double(), known) if bool(x.isfinite().all()) else None


def _finite(a: Tensor) -> Tensor:
    bad = (~a.isfinite()).sum(0)
    if bool(bad.any()):
        named = ", ".join(f"{count} values of attribute {i}" for i, count in enumerate(bad.tolist()) if count)
        raise ConfigError(f"{named} are NaN or infinite; leave these samples or attributes out")
    return a


class AttributeEstimator(SupervisedEstimator):
    """Score layers against attributes of the samples, such as labels, from a bank of rows.

    Args:
        in_key: Key of the latents, ``(*lead, n, d)``.
        attributes: Key of the attributes, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        out_key: Key to write.
        discrete: Whether attributes are integer labels: a bool, or one for each attribute.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
    """

    least_attributes = 1
    # As many as attributes, two at least, where it is None.
    least_units: int | None = None

    def __init__(self, in_key: Any, attributes: Any, out_key: Any, discrete: Any, bank_size: int) -> None:
        keys = [attributes] if isinstance(attributes, UnraveledKey) else list(attributes)
        super().__init__([in_key, *keys], [out_key])
        self.in_key, self.attributes, self.out_key = in_key, attributes, out_key
        self.discrete, self.bank_size = discrete, bank_size
        self._discrete = discrete if isinstance(discrete, bool) else tuple(map(bool, discrete))
        Reservoir(bank_size)

    def statistic(self) -> Statistic:
        """Return a `Reservoir` of ``bank_size`` rows."""
        return Reservoir(self.bank_size)

    def _one_shot(self, batch: Batch) -> Statistic:
        return Reservoir(max(1, batch.n))

    def target_names(self, count: int) -> tuple[str, ...]:
        """Name the attributes, for tables: by their keys where there is one key for each."""
        keys = tuple(map(str, self.target_keys))
        return keys if len(keys) == count else super().target_names(count)

    def _check(self, d: int, m: int) -> None:
        least = self.least_units or max(2, m)
        if m < self.least_attributes or d < least:
            raise ConfigError(
                f"{self.spec.name} got a layer of {d} units and {m} attributes; needed are {self.least_attributes} "
                f"attributes or more, and {least} units"
            )

    def _table(self, scores: Sequence[Sequence[Tensor | None]], lead: Sequence[int]) -> TensorDict:
        """Lay the scores of layers and data sets out, and name what is NaN."""
        score = laid_out(scores, lead)
        finite = torch.tensor([[x is not None for x in layer] for layer in scores], device=score.device)
        fine = finite.mT.reshape(*lead, len(scores))
        bad = (score.isnan() & fine.unsqueeze(-1)).flatten(0, -2).any(0).nonzero().squeeze(-1).tolist()
        if bad:
            names = self.target_names(score.shape[-1])
            warnings.warn(
                f"{self.spec.name}: {', '.join(repr(names[i]) for i in bad)} is NaN in some layer, for it is constant, "
                "or determined by another attribute, among the rows that were kept",
                stacklevel=3,
            )
        return TensorDict({"score": score, "finite": fine})


def laid_out(values: Sequence[Sequence[Tensor | None]], lead: Sequence[int]) -> Float[Tensor, "*lead l m"]:
    """Lay the m values of each layer (outside) and data set (inside) out; NaN for layers that are not finite."""
    known = next(
        (x for layer in values for x in layer if x is not None), torch.zeros(1, dtype=torch.float64, device="cpu")
    )
    blank = torch.full_like(known, torch.nan)
    rows = [torch.stack([blank if x is None else x for x in layer]).view(*lead, len(known)) for layer in values]
    return torch.stack(rows, -2)
