"""Say which estimators, layers and rows have no score of their own, and why."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.estimator import Estimator, not_finite, repeated_rows, warn_repeated


def warn_left_out(failed: Mapping[str, ConfigError], scored: Mapping[str, TensorDict]) -> dict[str, str]:
    """Name the estimators that cannot score these rows; the others keep what they found.

    Args:
        failed: What each of them says, by label.
        scored: What the others found, by label.

    Returns:
        The reasons by label.

    Raises:
        ConfigError: No estimator can.
    """
    if failed and not scored:
        raise next(iter(failed.values()))
    reasons = {label: str(error) for label, error in failed.items()}
    if reasons:
        said = "; ".join(f"{label} ({reason})" for label, reason in reasons.items())
        warnings.warn(f"left out, for these rows have no such score: {said}", stacklevel=5)
    return reasons


def warn_nan_layers(
    scored: Mapping[str, TensorDict], estimators: Mapping[str, Estimator], layers: Sequence[str]
) -> None:
    """Name the layers that an estimator has no score for at all, though their values are finite."""
    found: dict[tuple[str, ...], list[str]] = {}
    for label, scores in scored.items():
        if estimators[label].spec.kind == "supervised":
            continue
        score, known = scores["score"], set(not_finite(scores, layers))
        own = _own(score) if score.ndim > 1 else score
        bad = tuple(name for name, nan in zip(layers, own.isnan().tolist(), strict=True) if nan and name not in known)
        if bad:
            found.setdefault(bad, []).append(label)
    for bad, labels in found.items():
        names = ", ".join(map(repr, bad))
        warnings.warn(
            f"{', '.join(labels)}: NaN for {names}; the rows there are all alike, or too few for so many columns",
            stacklevel=5,
        )


def _own(score: Tensor) -> Tensor:
    """Return the pairs of layers with themselves: others are NaN if either is. All NaN where no other has a score."""
    own = score.diagonal()
    others = score[~torch.eye(len(score), dtype=torch.bool, device=score.device)]
    return torch.full_like(own, torch.nan) if len(others) and others.isnan().all() and not own.isnan().any() else own


def count_repeated(scored: Mapping[str, TensorDict], layers: Sequence[str]) -> dict[str, int]:
    """Return how many rows of each layer repeat an earlier one, where an estimator counted any, and say so."""
    counts = repeated_rows(scored.values(), layers)
    warn_repeated(counts)
    return counts
