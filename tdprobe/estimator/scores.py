"""What comes of scoring: several estimators over shared states, and layers that have no score."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tensordict import TensorDict

from tdprobe.errors import ConfigError
from tdprobe.stats.state import Derivation

if TYPE_CHECKING:
    from tdprobe.estimator.base import Estimator

# Layers that a warning names.
NAMED = 3


def score_all(
    estimators: Mapping[str, Estimator],
    states: Mapping[Any, Any],
    sources: Mapping[str, Hashable] | None = None,
    failed: dict[str, ConfigError] | None = None,
) -> dict[str, TensorDict]:
    """Score states with several estimators, and work out once what they have in common.

    Args:
        estimators: By label.
        states: By the statistics of the estimators, or by whatever ``sources`` says.
        sources: Which state each estimator reads, by label.
        failed: Takes what estimators say that cannot score these states, by label; without it that is raised.

    Returns:
        What `Estimator.score` returns, by label.

    Raises:
        ConfigError: An estimator cannot score, and there is no ``failed``.
    """
    if sources is None:
        sources = {label: estimator.statistic() for label, estimator in estimators.items()}
    derivations: dict[Hashable, list[Derivation]] = {}
    chosen: dict[str, tuple[Hashable, int] | None] = {}
    for label, estimator in estimators.items():
        source = sources[label]
        with _noted(label, failed):
            wanted = estimator.derivation(states[source])
            chosen[label] = None if wanted is None else (source, _join(derivations.setdefault(source, []), wanted))
    derived = {
        (source, place): derivation(states[source])
        for source, found in derivations.items()
        for place, derivation in enumerate(found)
    }
    found = {}
    for label, key in chosen.items():
        with _noted(label, failed):
            found[label] = estimators[label].score(states[sources[label]] if key is None else derived[key])
    return found


@contextmanager
def _noted(label: str, failed: dict[str, ConfigError] | None) -> Generator[None]:
    try:
        yield
    except ConfigError as error:
        if failed is None:
            raise
        failed[label] = error


def _join(derivations: list[Derivation], wanted: Derivation) -> int:
    """Let a derivation in with the first that it can be joined with; return the place of that one."""
    for place, held in enumerate(derivations):
        if (joined := held.joined(wanted)) is not None:
            derivations[place] = joined
            return place
    derivations.append(wanted)
    return len(derivations) - 1


def not_finite(scores: TensorDict, layers: Sequence[str]) -> list[str]:
    """Return the layers that scores call not finite."""
    finite = scores.get("finite", None)
    if finite is None:
        return []
    kept = finite.flatten(0, -2).all(0) if finite.ndim > 1 else finite
    return [name for name, fine in zip(layers, kept.tolist(), strict=True) if not fine]


def warn_not_finite(layers: Sequence[str]) -> None:
    """Name the layers whose scores are NaN because their values are not finite."""
    if layers:
        names = ", ".join(map(repr, layers))
        warnings.warn(f"{names} held NaN or infinite values; scores that involve them are NaN", stacklevel=3)


def repeated_rows(scores: Iterable[TensorDict], layers: Sequence[str]) -> dict[str, int]:
    """Return how many rows of each layer repeat an earlier one, where an estimator counted any."""
    counts = (one.get("duplicates", None) for one in scores)
    # Data sets together.
    totals = (count.reshape(-1, len(layers)).sum(0).tolist() for count in counts if count is not None)
    return {name: count for total in totals for name, count in zip(layers, total, strict=True) if count}


def warn_repeated(counts: Mapping[str, int]) -> None:
    """Tell how many rows repeat earlier ones: causal models give identical rows for identical prefixes."""
    if counts:
        most = sorted(counts, key=lambda name: -counts[name])[:NAMED]
        others = f" and some of {len(counts) - NAMED} more layers" if len(counts) > NAMED else ""
        named = ", ".join(f"{counts[name]} row{'s' * (counts[name] > 1)} of {name!r}" for name in most)
        warnings.warn(
            f"{named}{others} repeat earlier ones, as rows do after identical prefixes; each measure of neighbours "
            "says how it counts copies",
            stacklevel=3,
        )
