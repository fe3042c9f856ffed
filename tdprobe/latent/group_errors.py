"""Standard errors of scores, from leaving out one group of rows after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.estimator import Estimator, score_all
from tdprobe.latent.kept_states import GroupedState
from tdprobe.stats.jackknife import jackknife_se
from tdprobe.stats.state import State


def score_groups(
    estimators: Mapping[str, Estimator], held: GroupedState, failed: dict[str, ConfigError] | None = None
) -> tuple[dict[str, TensorDict], dict[str, Tensor], int]:
    """Score what a source keeps, and estimate the errors of scores where an estimator does not tell them itself.

    Args:
        estimators: Those that read the source, by label.
        held: Its state, in groups of rows.
        failed: Takes what estimators say that cannot score these rows, by label; without it that is raised.

    Returns:
        By label: what `Estimator.score` returned, and standard errors for a state that is kept in groups; and the
        number of rows.
    """
    found, n = _scored(estimators, held.total(), failed)
    named = {label: estimators[label] for label, scores in found.items() if "se" not in scores.keys()}
    if not named or len(held.filled) < 2:
        return found, {}, n
    try:
        replicas = [_scored(named, state)[0] for state in held.without()]
    except ConfigError:
        # Too few rows are left to score without a group.
        return found, {}, n
    sizes = torch.tensor(held.sizes, dtype=torch.float64, device="cpu")
    errors = {}
    for label in named:
        without = torch.stack([replica[label]["score"] for replica in replicas])
        errors[label] = jackknife_se(found[label]["score"], without, sizes)
    return found, errors, n


def _scored(
    estimators: Mapping[str, Estimator], state: State, failed: dict[str, ConfigError] | None = None
) -> tuple[dict[str, TensorDict], int]:
    return score_all(estimators, {"": state}, dict.fromkeys(estimators, ""), failed), int(cast("Any", state).n)
