"""Standard errors of scores, from leaving out one group of rows after the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.estimator import Estimator, score_all
from tdprobe.latent.kept_states import GroupedState, Source
from tdprobe.stats.jackknife import jackknife_se


def group_errors(
    estimators: Mapping[str, Estimator],
    sources: Mapping[str, Source],
    groups: Mapping[Source, GroupedState],
    found: Mapping[str, TensorDict],
) -> dict[str, Tensor]:
    """Estimate the errors of scores where an estimator does not tell them itself.

    Args:
        estimators: By label.
        sources: What each estimator reads.
        groups: The states of each source.
        found: What `Estimator.score` returned for all rows.

    Returns:
        Standard errors by label, for states that are kept in groups.
    """
    errors = {}
    for source, held in groups.items():
        own = {label: estimators[label] for label, read in sources.items() if read == source}
        named = {label: item for label, item in own.items() if "se" not in found[label].keys()}
        if not named or len(held.filled) < 2:
            continue
        sizes = torch.tensor(held.sizes, dtype=torch.float64)
        try:
            replicas = [score_all(named, {source: state}, dict.fromkeys(named, source)) for state in held.without()]
        except ConfigError:
            # Too few rows are left to score without a group.
            continue
        for label in named:
            without = torch.stack([replica[label]["score"] for replica in replicas])
            errors[label] = jackknife_se(found[label]["score"], without, sizes)
    return errors
