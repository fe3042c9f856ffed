"""
Sixteen measures of similarity side by side
===========================================

There is no one similarity of two layers. All measures of tdprobe score the same tokens of SmolLM2 in a single pass;
then: which of them put the pairs of layers in the same order, and which do not?
"""

from contextlib import ExitStack

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from tensordict import TensorDict

from tdprobe import CkaEstimator, LayerScoring, hf
from tdprobe.latent import CcaEstimator, MutualKnnEstimator
from tdprobe.viz import heatmap

# %%
# One pass
# --------
#
# What measures read is kept once for all that read it: one set of cross-covariances serves the six that know layers
# by their linear maps, one bank of tokens the nine that look at distances and neighbours, minibatches the one that is
# left. A name stands for the form that is safe on activations, such as unbiased CKA. Errors are left out
# (``groups=0``) to save time.

LAYERS = r"model\.layers\.(0|4|8|12|16|20|24|28)$"
measures = {
    "cka": "cka",
    "cka, rbf kernel": CkaEstimator(kernel="rbf", mode="robust"),
    "distance_correlation": "distance_correlation",
    "rsa": "rsa",
    "procrustes": "procrustes",
    "gulp": "gulp",
    "linear_regression": "linear_regression",
    "cca": "cca",
    "svcca": "svcca",
    "pwcca": "pwcca",
    "cknna": "cknna",
    "mutual_knn": "mutual_knn",
    "jaccard": "jaccard",
    "rank_similarity": "rank_similarity",
    "second_order_cosine": "second_order_cosine",
    "information_imbalance": "information_imbalance",
}
scoring = LayerScoring(LAYERS, measures, groups=0)
# A second question to the same pass, for later: one row per text, the mean of all its tokens.
means = LayerScoring(r"model\.layers\.\d*[02468]$", ["cka"], tokens="mean", max_norm=None, null=99, groups=0)

demo = hf.load("demo")
texts = hf.read_texts("demo", limit=64)
with torch.no_grad(), ExitStack() as stack:
    hooked, hooked_means = [stack.enter_context(item.prepare(demo.model)) for item in (scoring, means)]
    for batch in hf.batches(texts, demo.tokenizer, sort_by_length=True):
        demo.model(**batch.inputs)
table = hooked.scores()
for block in table.blocks:
    print(f"{block.estimator:22} {block.n:5} rows by {block.route}")

# %%
# Sixteen pictures of the same layers
# -----------------------------------
#
# Bright is similar in all of them: colours of measures that fall with similarity are turned round. Each panel has the
# range of its own scores off the diagonal.

depths = [name.rsplit(".", 1)[1] for name in table.layers()]
fig, axes = plt.subplots(4, 4, figsize=(11, 11.4), sharex=True, sharey=True, layout="constrained")
off = ~np.eye(len(depths), dtype=bool)
for ax, name in zip(axes.flat, measures, strict=True):
    values = table.matrix(name)
    low, high = values[off].min(), values[off].max()
    distance = scoring.estimators[name].spec.larger_is_similar is False
    ax.imshow(values, cmap="viridis_r" if distance else "viridis", vmin=low, vmax=high, origin="lower")
    ax.set_title(f"{name}\n{low:.2f} to {high:.2f}", fontsize=9)
    ax.set_xticks(range(len(depths)), depths)
    ax.set_yticks(range(len(depths)), depths)
fig.supxlabel("layer")
fig.supylabel("layer")

# %%
# All tell one story: neighbouring layers are alike, layers 12 to 20 most of all, the first and the last have least in
# common. What the numbers are worth differs. Between 576 columns and fewer than 1,500 rows, CCA finds a lot even where
# there is nothing, so its lowest scores are hardly more than chance; mutual kNN takes chance out.

rows = int(table.block("cca").n)
noise = torch.randn(2, rows, 576, generator=torch.Generator().manual_seed(0))
noise = TensorDict({"data_a": noise[0], "data_b": noise[1]})
chance = float(CcaEstimator()(noise)["cca"])
print(f"CCA of noise: {chance:.2f}; of layers: {table.matrix('cca')[off].min():.2f} at least")
chance_knn = float(MutualKnnEstimator(mode="robust")(noise)["mutual_knn"])
print(f"mutual kNN of noise: {chance_knn:.2f}; of layers: {table.matrix('mutual_knn')[off].min():.2f} at least")

# %%
# Which measures agree
# --------------------
#
# The rank correlation of two measures over the 56 ordered pairs of different layers: 1 where both put the pairs in the
# same order.

signs = [-1 if item.spec.larger_is_similar is False else 1 for item in scoring.estimators.values()]
columns = np.stack([sign * table.matrix(name)[off] for sign, name in zip(signs, measures, strict=True)], axis=1)
agreement = spearmanr(columns).statistic

fig, ax = plt.subplots(figsize=(9.6, 8.2), layout="constrained")
image = ax.imshow(agreement, cmap="viridis", vmin=agreement.min(), vmax=1)
ax.set_xticks(range(len(measures)), measures, rotation=60, ha="right", rotation_mode="anchor")
ax.set_yticks(range(len(measures)), measures)
for (row, column), value in np.ndenumerate(agreement):
    ax.text(column, row, f"{value:.2f}", ha="center", va="center", size=7, color="k" if value > 0.9 else "w")
fig.colorbar(image, label="rank correlation over pairs of layers", shrink=0.8)

# %%
# Ten of them could stand for one another here, whether they read kernels, rotations or neighbours: CKA with either
# kernel, distance correlation, RSA, Procrustes, GULP, CKNNA, mutual kNN, Jaccard and rank similarity. CCA and SVCCA
# count every direction alike, however little varies along it; they and PWCCA agree better with one another than with
# CKA. The cosines of second order are all near 1, and stand furthest apart.
#
# Three measures have a direction, and two of them contradict each other. A linear map predicts more of layer 0 from
# layer 28 than the other way round, but the nearest tokens of layer 0 are nearer in layer 28 than the other way
# round:

regression, imbalance = table.matrix("linear_regression"), table.matrix("information_imbalance")
print(f"linear regression, R2: from layer 0 to 28 {regression[0, -1]:.2f}, back {regression[-1, 0]:.2f}")
print(f"information imbalance: from layer 0 to 28 {imbalance[0, -1]:.2f}, back {imbalance[-1, 0]:.2f} (0 is best)")

# %%
# Is there anything in common at all?
# -----------------------------------
#
# The second scoring had one row per text, the mean of its tokens, long rows included. ``null=99`` scored CKA of rows in
# random order as well, and a dot marks pairs that more than one shuffle in 20 reaches: for CKA, the early layers and
# those in the middle might as well be unrelated. The long rows of a few words decide, of others here than there
# (:doc:`plot_01_layers_of_a_language_model`). A score without a null, or of the wrong rows, says little.

of_means = hooked_means.scores()
block = of_means.block("cka")
fig, ax = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
title = f"cka of text means (n = {block.n}; dots: p > 0.05)"
depths = [name.rsplit(".", 1)[1] for name in block.layers_a]
heatmap(block.values, depths, depths, estimator="cka", p=block.p, title=title, ax=ax)
