"""
How many dimensions do activations fill?
========================================

A layer of SmolLM2 has 576 units, but its activations lie near a surface of far fewer dimensions. Estimators that look
at nearest neighbours only, first two where the answer is known, then four layer by layer, in one pass over a corpus.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from tensordict import TensorDict

from tdprobe import LayerScoring, hf
from tdprobe.latent import GrideDimensionEstimator, LocalKnnDimensionEstimator, TwoNnDimensionEstimator

# %%
# Where the answer is known
# -------------------------
#
# Two thousand points on surfaces of known dimension, turned into 20 columns. ``TwoNnDimensionEstimator`` reads the
# dimension off the ratio of the distances to the second and the first neighbour; its error is about 1.5 d / sqrt(n).
# ``LocalKnnDimensionEstimator`` gives a value around each point; their median is shown.

N = 2000
generator = torch.Generator().manual_seed(0)


def uniform(*shape):
    return torch.rand(*shape, generator=generator)


def normal(*shape):
    return torch.randn(*shape, generator=generator)


def swiss_roll():
    # Uniform on the sheet: the length of the spiral grows like the square of the angle.
    angle = ((1.5 * torch.pi) ** 2 + uniform(N) * ((4.5 * torch.pi) ** 2 - (1.5 * torch.pi) ** 2)).sqrt()
    return torch.stack([angle * angle.cos(), 21 * uniform(N), angle * angle.sin()], 1)


surfaces = {
    "line": (uniform(N, 1), 1),
    "sphere": (torch.nn.functional.normalize(normal(N, 3), dim=1), 2),
    "Swiss roll": (swiss_roll(), 2),
    "cube": (uniform(N, 3), 3),
    "5-cube": (uniform(N, 5), 5),
    "9-cube": (uniform(N, 9), 9),
}
turn = torch.linalg.qr(normal(20, 20)).Q
data = torch.stack([x @ turn[: x.shape[1]] for x, _ in surfaces.values()])
truth = [dimension for _, dimension in surfaces.values()]

td = TensorDict({"data": data}, batch_size=[len(surfaces)])
twonn = TwoNnDimensionEstimator(discard=0.1, distinct=True)(td)["dimension"].clone()
local = LocalKnnDimensionEstimator(k=8)(td)["dimension"].median(-1).values
error = [1.5 * d / math.sqrt(N) for d in truth]

fig, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
places = np.arange(len(surfaces))
ax.errorbar(places - 0.08, twonn, yerr=[2 * e for e in error], fmt="o", capsize=3, label="TwoNN, 2 standard errors")
ax.plot(places + 0.12, local, "s", color="#d1495b", label="local kNN, median")
ax.hlines(truth, places - 0.35, places + 0.35, color="0.4", lw=1, label="truth")
ax.set_xticks(places, surfaces)
ax.set_ylabel("dimension")
ax.legend(frameon=False)

# %%
# Points of many dimensions are all near an edge, where neighbours are missing on one side: both estimators fall short
# there, the more so the more dimensions there are.
#
# Layer by layer
# --------------
#
# ``LayerScoring`` keeps a bank of tokens, the same ones in every layer, finds the neighbours of each layer once, and
# reads all estimators off them. The likelihood of Levina and Bickel (``mle``) reads the distances to the first 20
# neighbours, GRIDE the ratio of the distances to the neighbours of ranks k and 2 k, here at six scales. A token has the
# same embedding wherever it stands: repetitions are counted, and left out of the dimension.

demo = hf.load("demo")
texts = hf.read_texts("demo", limit=80)
ranks = [1, 2, 4, 8, 16, 32]
scales = {f"gride {k}": GrideDimensionEstimator(n1=k, range_max=2 * k, mode="robust") for k in ranks}
measures = {name: name for name in ("twonn", "mle", "local_knn", "information_imbalance")} | scales

with torch.no_grad(), LayerScoring(r"model\.(embed_tokens|layers\.\d+)$", measures).prepare(demo.model) as hooked:
    for batch in hf.batches(texts, demo.tokenizer, sort_by_length=True):
        hooked(batch.inputs)

table = hooked.scores()
layers = table.block("twonn").layers_a
n = table.block("twonn").n
repeated = [table.meta["duplicates"].get(layer, 0) for layer in layers]
print(f"{n} tokens; repeated: {repeated[0]} in the embedding, {max(repeated[1:])} at most in the layers after it")

# %%
# The standard error comes with the score. Bands are two of them.

shown = {
    "twonn": "TwoNN",
    "mle": "likelihood, 20 neighbours",
    "gride 8": "GRIDE, ranks 8 and 16",
    "local_knn": "local kNN",
}
dimension = {name: table.matrix(name) for name in shown}
error = {name: table.block(name).se for name in shown}

fig, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
depth = np.arange(len(layers))
for name, label in shown.items():
    low, high = dimension[name] - 2 * error[name], dimension[name] + 2 * error[name]
    (line,) = ax.plot(depth, dimension[name], "o-", ms=3, lw=1.3, label=label)
    ax.fill_between(depth, low, high, alpha=0.2, lw=0, color=line.get_color())
ax.set_xlabel("layer (0: the embedding)")
ax.set_ylabel("dimension")
ax.set_ylim(0)
ax.legend(frameon=False)

# %%
# They do not see the same: dimension depends on the scale. TwoNN looks at the nearest neighbour, and in the first
# layers that is the same token in another sentence; what varies there is context, of which early layers know little.
# The likelihood and GRIDE look a little further, and part from TwoNN in the last third, where it falls and they stay.
# Local kNN looks as far as ``sqrt(n)`` neighbours, to other tokens, whose variety the embedding brings along.
#
# One layer at several scales
# ---------------------------
#
# In layer 1 the dimension hardly depends on the scale up to rank 16: one token in many sentences fills about three
# dimensions. Layer 15 has no such plateau, the further one looks the more dimensions there are, so that no single
# number is its dimension. With k = 1 GRIDE is TwoNN by likelihood, without leaving out the largest ratios: a few
# tokens with a near copy pull it down.

places = {"layer 1": 1, "layer 15": 15}
by_scale = np.array([table.matrix(name) for name in scales])
scale_error = np.array([table.block(name).se for name in scales])

fig, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
for name, place in places.items():
    ax.errorbar(ranks, by_scale[:, place], yerr=2 * scale_error[:, place], fmt="o-", ms=4, capsize=3, label=name)
ax.set_xscale("log", base=2)
ax.set_xticks(ranks, ranks)
ax.set_xlabel("rank k of the nearer neighbour")
ax.set_ylabel("dimension, 2 standard errors")
ax.set_ylim(0)
ax.legend(frameon=False)

# %%
# What one layer's neighbours say about another's
# -----------------------------------------------
#
# Information imbalance asks how far down the list of the column's layer the nearest neighbour in the row's layer is:
# 0 if it is the nearest there too, 1 if it is a random token; bright is similar, as in all pictures. It is not
# symmetric. The upper left is darker than the lower right: early layers say more about late ones than late ones about
# early ones. Half-way the model has thrown away what made tokens neighbours at first.

imbalance = table.matrix("information_imbalance")
fig, ax = plt.subplots(figsize=(6.2, 5.2), layout="constrained")
table.plot("information_imbalance", ax=ax)
