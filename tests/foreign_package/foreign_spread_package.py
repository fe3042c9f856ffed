"""An estimator as another package would bring it."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from tdprobe.estimator import LayerEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats import Moments, layer_list


@register(
    Spec(
        name="foreign_spread",
        kind="layer",
        symmetric=False,
        bounds=(0.0, float("inf")),
        larger_means="more spread",
        invariant_to=frozenset({"permutation", "orthogonal", "translation"}),
        needs=("moments",),
        cost="n d^2",
        reference="none",
    )
)
class Spread(LayerEstimator):
    """Root of the summed variance of all columns."""

    def __init__(self, in_key="data", out_key="spread"):
        super().__init__([in_key], [out_key])
        self.in_key, self.out_key = in_key, out_key

    def statistic(self):
        return Moments()

    def score(self, state):
        traces = [s.diagonal(dim1=-2, dim2=-1).sum(-1) for s in layer_list(state.scatters)]
        total = torch.stack(traces, -1) / torch.where(state.n > 0, state.n, torch.nan)
        return TensorDict({"score": total.sqrt()})
