"""
Bilinear probes on pairs of layers
==================================

Some things no layer knows by itself: they are in how two layers go together. Here is a task whose answer is known
beforehand, and probes that find it.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from tdprobe.latent import (
    BilinearProbeManager,
    LinearEstimator,
    LowRankBilinearEstimator,
    ProbeManager,
    Probing,
)
from tdprobe.viz import heatmap

# %%
# Who knows what
# --------------
#
# Two hidden signs *a* and *b* are drawn by fair coins. One layer of the model sees *a*, another *b*, a third sees *a*
# through other weights, a fourth sees noise only. The label says whether *a* = *b*: each sign alone is independent of
# it, and so is every linear function of both.

torch.manual_seed(0)
signs = 2.0 * torch.randint(0, 2, (2000, 2)) - 1
noise = torch.randn(2000, 6)
x = torch.cat([signs, noise], 1)
labels = (signs[:, 0] == signs[:, 1]).long()


parts = {"sees_a": [0, 2, 3], "sees_b": [1, 4, 5], "sees_a_too": [0, 6, 7], "sees_noise": [2, 4, 6]}


class Readers(nn.Module):
    """Four layers, each with its own part of the input."""

    def __init__(self):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, nn.Linear(len(part), 8))

    def forward(self, x):
        return sum(getattr(self, name)(x[:, part]) for name, part in parts.items())


model = Readers()
layers = list(parts)
train, test = slice(0, 1000), slice(1000, 2000)


def accuracy(predictions, labels):
    return {"accuracy": (predictions == labels).float().mean().item()}


# %%
# Linear probes
# -------------
#
# One probe per layer. All of them guess.

options = {"num_classes": 2, "epochs": 100, "lr": 0.02}
linear = ProbeManager(LinearEstimator, {"d_latent": 8, **options}, accuracy)
probing = Probing("sees", linear.probe_factory, additional_keys=["labels", "step_type"])
with probing.prepare(model) as hooked:
    hooked(x[train], labels=labels[train], step_type="fit")
    hooked(x[test], labels=labels[test], step_type="predict")

alone = [linear.predict_metrics[f"{name}_fwd"]["accuracy"] for name in layers]
print(*(f"{name}: {score:.2f}" for name, score in zip(layers, alone, strict=True)), sep="   ")

# %%
# Bilinear probes
# ---------------
#
# ``BilinearProbeManager`` makes one probe per pair of layers, and the pattern that hooks them. A probe waits until
# both layers of its pair have run; ``after_all`` complains if one never did. Rank one per class is enough for a product
# of two directions.

pairs = [(a, b) for i, a in enumerate(layers) for b in layers[i:]]
bilinear = BilinearProbeManager(pairs, LowRankBilinearEstimator, {"d_latent1": 8, "d_latent2": 8, **options}, accuracy)
probing = Probing(bilinear.key_pattern, bilinear.probe_factory, additional_keys=["labels", "step_type"])
with probing.prepare(model) as hooked:
    for rows, step_type in ((train, "fit"), (test, "predict")):
        bilinear.before_all()
        hooked(x[rows], labels=labels[rows], step_type=step_type)
        bilinear.after_all()

# %%
# The pairs that hold both signs stand out, and no others.

together = torch.zeros(len(layers), len(layers))
for a, b in pairs:
    score = bilinear.predict_metrics[f"{a}_{b}_fwd"]["accuracy"]
    together[layers.index(a), layers.index(b)] = together[layers.index(b), layers.index(a)] = score

fig, ax = plt.subplots(figsize=(6, 4.6), layout="constrained")
heatmap(together, layers, layers, estimator="accuracy", ax=ax)
ax.set_title("accuracy of bilinear probes, by pair of layers", loc="left")
