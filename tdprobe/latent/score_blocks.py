"""From scores over all layers to the blocks of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tdprobe.estimator import Estimator, SupervisedEstimator
from tdprobe.latent.permutation_null import Null
from tdprobe.tables.block import ScoreBlock


@dataclass(frozen=True)
class Scored:
    """Hold what an estimator says of all layers.

    Args:
        score: (l,), (l, l), or (l, m) for m targets.
        n: Rows behind it.
        route: How it came about.
        se: Standard error of each score.
        null: What unrelated rows score.
    """

    score: Tensor
    n: int
    route: str = ""
    se: Tensor | None = None
    null: Null | None = None


def score_blocks(
    scored: Mapping[str, Scored], estimators: Mapping[str, Estimator], labels: Sequence[tuple[str, str]]
) -> list[ScoreBlock]:
    """Cut scores over all layers of all checkpoints into one block per pair of checkpoints.

    Args:
        scored: By estimator label.
        estimators: The estimators by label.
        labels: (checkpoint, layer) of each of the l rows.
    """
    places: dict[str, list[int]] = {}
    for place, (checkpoint, _) in enumerate(labels):
        places.setdefault(checkpoint, []).append(place)
    layers = {name: tuple(labels[i][1] for i in found) for name, found in places.items()}
    return [block for label, found in scored.items() for block in _cut(label, found, estimators[label], places, layers)]


def _cut(
    label: str,
    scored: Scored,
    estimator: Estimator,
    places: Mapping[str, list[int]],
    layers: Mapping[str, tuple[str, ...]],
) -> Iterator[ScoreBlock]:
    common: dict[str, Any] = {"n": scored.n, "route": scored.route, "method": estimator.spec.name}
    arrays = {name: _array(value) for name, value in _parts(scored).items()}
    values = _array(scored.score)

    def part(*index: Any) -> dict[str, Any]:
        return {"values": values[index], **{name: array[index] for name, array in arrays.items()}, **common}

    if isinstance(estimator, SupervisedEstimator):
        names = estimator.target_names(values.shape[1])
        key = ", ".join(map(str, estimator.target_keys))
        for a, rows in places.items():
            yield ScoreBlock(label, a, key, layers[a], names, symmetric=False, columns="targets", **part(rows))
    elif values.ndim == 1:
        for a, rows in places.items():
            yield ScoreBlock(label, a, a, layers[a], None, **part(rows))
    else:
        symmetric = estimator.spec.symmetric
        for position, (a, rows) in enumerate(places.items()):
            for b, columns in list(places.items())[position if symmetric else 0 :]:
                yield ScoreBlock(label, a, b, layers[a], layers[b], symmetric=symmetric, **part(*np.ix_(rows, columns)))


def _parts(scored: Scored) -> dict[str, Tensor]:
    found = {} if scored.se is None else {"se": scored.se}
    null = scored.null
    return found if null is None else found | {"null": null.mean, "null_sd": null.sd, "p": null.p}


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().double().numpy()
