"""Minimum description length: how many bits it takes to send labels to one who has the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tdprobe.errors import ConfigError, unknown
from tdprobe.latent.information.predictive import Array, Family, canonical
from tdprobe.latent.information.probed_estimator import ProbedEstimator, single
from tdprobe.registry import Spec, register

# Shares of the rows after which a new probe is fitted, those of the paper.
FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
MEASURES = ("compression", "codelength")


@dataclass(frozen=True)
class Codelength:
    """Hold what it costs to send labels.

    Attributes:
        online: Bits by online coding.
        uniform: Bits without the layer, ``n log2 k`` for k classes.
        ends: After how many rows each block ends.
        blocks: Bits of each block; of the first one without the layer.
        se: Standard error of ``online``, for independent rows.
    """

    online: float
    uniform: float
    ends: tuple[int, ...]
    blocks: tuple[float, ...]
    se: float

    @property
    def compression(self) -> float:
        """How many times shorter the code is than the uniform one; NaN for a single class."""
        return self.uniform / self.online if self.online else math.nan


def online_codelength(
    x: Any, y: Any, *, fractions: Sequence[float] = FRACTIONS, probe: Any = None, seed: int = 0
) -> Codelength:
    """Measure how many bits it takes to send labels to one who has the rows, by online coding.

    Blocks of labels are sent one after the other, the first by the uniform code and each further one by the
    probabilities that a probe gives it which was fitted to all blocks before:
    ``L = n_1 log2 k - sum_i log2 p_i(block i + 1)``. Short where labels can be read after few examples: what is hard to
    learn costs, not only what stays unclear. For labels that have nothing to do with the rows it is about
    ``n log2 k``, and the compression about 1.

    Args:
        x: Rows ``(n, d)``, numpy or torch; 4 or more.
        y: Labels ``(n,)``, integers that number classes.
        fractions: Shares of the rows at which blocks end, ascending up to 1; blocks that would be empty are left out.
        probe: Makes other probes than linear ones, see `v_information`.
        seed: Of the order of the rows, and of such probes.

    Returns:
        The code, in bits.

    Raises:
        ConfigError: Fewer than 4 rows, shapes that do not fit, values that are not finite, labels that are no integers,
            or fractions that do not end with 1.

    Example:
        >>> import torch
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> code = online_codelength(x, x[:, 0] > 0)
        >>> code.uniform, code.compression > 5
        (1000.0, True)

    References:
        Voita, Titov 2020, Information-theoretic probing with minimum description length.
    """
    return _code(*single(x, y, True, probe, seed, ProbedEstimator.least_rows), check_fractions(fractions))


def check_fractions(fractions: Any) -> tuple[float, ...]:
    """Return where blocks end, or say what is wrong with it.

    Raises:
        ConfigError: They do not ascend from above 0 to 1, or are fewer than two.
    """
    found = tuple(float(share) for share in fractions)
    steps = np.diff([0.0, *found])
    if len(found) < 2 or not (steps > 0).all() or found[-1] != 1:
        raise ConfigError(f"got fractions={fractions!r}; allowed are ascending shares above 0, two or more, up to 1.0")
    return found


def _code(x: Array, y: Array, family: Family, fractions: tuple[float, ...]) -> Codelength:
    classes = int(family.classes or 1)
    order = canonical(x, y)
    order = order[np.random.default_rng(family.seed).permutation(len(y))]
    ends = np.unique([math.ceil(share * len(y)) for share in fractions]).tolist()
    bits, scatter = [ends[0] * math.log2(classes)], 0.0
    for start, end in pairwise(ends):
        fitted, held = order[:start], order[start:end]
        found = family.seeing(x[fitted], y[fitted], x[held], y[held]) / math.log(2) if classes > 1 else np.zeros(1)
        bits.append(float(found.sum()))
        scatter += float(np.square(found - found.mean()).sum())
    return Codelength(sum(bits), len(y) * math.log2(classes), tuple(ends), tuple(bits), scatter**0.5)


@register(
    Spec(
        name="mdl",
        kind="supervised",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="labels that are easier to learn from the layer",
        invariant_to=frozenset({"permutation", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="a probe per layer, label, block and penalty, n d per step of each",
        reference="Voita, Titov 2020, Information-theoretic probing with minimum description length",
    )
)
class MdlEstimator(ProbedEstimator):
    """Measure how well a layer compresses labels, by online coding with linear probes, see `online_codelength`.

    Rows count as independent: where each text has one label, ``tokens="last"`` or ``"mean"`` gives one row per text.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        labels: Key of the labels, integers, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        out_key: Key to write, ``(*lead, m)`` float32.
        measure: ``"compression"``, how many times shorter the code is than the uniform one, or ``"codelength"`` in
            bits, which grows with the number of rows.
        fractions: Shares of the rows at which blocks end.
        probe: Makes other probes, see `v_information`.
        seed: Of the order of the rows, and of such probes.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, an unknown measure, bad fractions, or a probe that cannot be made.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> td = MdlEstimator()(TensorDict({"data": x, "labels": (x[:, 1] > 0).long()}))
        >>> bool(td["mdl"] > 3)
        True

    References:
        Voita, Titov 2020, Information-theoretic probing with minimum description length.
    """

    def __init__(
        self,
        in_key: Any = "data",
        labels: Any = "labels",
        out_key: Any = "mdl",
        measure: str = "compression",
        *,
        fractions: Sequence[float] = FRACTIONS,
        probe: Any = None,
        seed: int = 0,
        bank_size: int = 4096,
    ) -> None:
        super().__init__(in_key, labels, out_key, True, probe, seed, bank_size)
        if measure not in MEASURES:
            raise ConfigError(unknown("measure", str(measure), MEASURES))
        self.measure, self.fractions = measure, fractions
        check_fractions(fractions)

    def _value(self, x: Array, y: Array, family: Family) -> tuple[float, float]:
        code = _code(x, y, family, check_fractions(self.fractions))
        if self.measure == "codelength":
            return code.online, code.se
        return code.compression, code.compression * code.se / code.online if code.online else math.nan
