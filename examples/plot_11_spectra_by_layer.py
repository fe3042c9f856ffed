"""
Spectra, entropy and curvature by layer
=======================================

How many directions do the activations of a layer spread over, and how much do they bend from token to token? Five
measures read from one pass of SmolLM2 over a corpus, after a look at what they say of spectra that are known.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from tensordict import TensorDict

from tdprobe import LayerScoring, hf
from tdprobe.latent import (
    CurvatureEstimator,
    EffectiveRankEstimator,
    MatrixEntropyEstimator,
    ParticipationRatioEstimator,
    RankMeEstimator,
)

# %%
# Three ways to count directions
# ------------------------------
#
# In 40 columns, variances fall like ``k^-a``. All three measures are 40 where they are equal, and near 1 where the
# first is all there is. In between they differ by what a small variance counts for: the participation ratio squares
# variances, the effective rank takes the entropy of their shares, and RankMe that of the shares of standard deviations.

D = 40
powers = np.linspace(0, 4, 17)
axes = torch.cat([torch.eye(D), -torch.eye(D)])
counts = torch.arange(1.0, D + 1)
data = torch.stack([axes * counts ** (-a / 2) for a in powers])
estimators = {
    "RankMe": RankMeEstimator(),
    "effective rank": EffectiveRankEstimator(),
    "participation ratio": ParticipationRatioEstimator(),
}
td = TensorDict({"data": data}, batch_size=[len(powers)])
known = {name: estimator(td)[estimator.out_key].numpy() for name, estimator in estimators.items()}

fig, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for (name, values), color in zip(known.items(), ("#2a6f97", "#d1495b", "#3a7d44"), strict=True):
    ax.plot(powers, values, "o-", ms=3.5, color=color, label=name)
ax.set_xlabel("a, in variances of $k^{-a}$")
ax.set_ylabel("directions, of 40")
ax.set_ylim(0)
ax.legend(frameon=False)

# %%
# Layer by layer
# --------------
#
# Each layer keeps its mean and its scatter matrix, whatever the number of tokens, and its eigenvalues are found once
# for all measures of the same matrix. Curvature needs to know which tokens follow each other: every call says which
# text is which. Two entropies show what ``center`` does to a number: without it, the direction that all tokens share
# is one of the directions, and often the largest.

demo = hf.load("demo")
texts = hf.read_texts("demo", limit=100)
scoring = LayerScoring(
    r"model\.(embed_tokens|layers\.\d+)$",
    {
        "participation_ratio": ParticipationRatioEstimator(),
        "effective_rank": EffectiveRankEstimator(),
        "rankme": RankMeEstimator(),
        "entropy": MatrixEntropyEstimator(),
        "entropy centred": MatrixEntropyEstimator(center=True),
        "curvature": CurvatureEstimator(),
    },
    rows_per_update=2048,
    groups=0,
)
seen = 0
with torch.no_grad(), scoring.prepare(demo.model) as hooked:
    for batch in hf.batches(texts, demo.tokenizer, sort_by_length=True):
        size = len(batch.inputs["input_ids"])
        hooked(batch.inputs, text=torch.arange(seen, seen + size))
        seen += size

table = hooked.hooking_context.scores()
layers = table.block("rankme").layers_a
n = table.block("rankme").n
scores = {name: table.block(name).values.reshape(-1) for name in scoring.estimators}
print(f"{n} tokens of {seen} texts, {len(layers)} layers")

# %%
# Participation ratio and effective rank agree about where variance spreads: little in the embedding, where a few
# frequent tokens make up most of the rows, more in the layers, and little again in the last one, which has to decide.
# RankMe says the opposite of the embedding, forty times as much as the participation ratio: it takes roots, and sees
# hundreds of small directions. Which of them is right depends on whether small directions matter to the question.

depth = np.arange(len(layers))
fig, (ranks, entropies, bends) = plt.subplots(3, 1, figsize=(7.5, 8.5), layout="constrained", sharex=True)
for name, color in (("rankme", "#2a6f97"), ("effective_rank", "#d1495b"), ("participation_ratio", "#3a7d44")):
    ranks.semilogy(depth, scores[name], "o-", ms=3.5, color=color, label=name.replace("_", " "))
ranks.axhline(min(n, 576), color="0.6", lw=1, ls=":", label="columns (576)")
ranks.set_ylabel("directions")
ranks.legend(frameon=False, ncols=2)
for name, color in (("entropy", "#d1495b"), ("entropy centred", "#2a6f97")):
    entropies.plot(depth, scores[name], "o-", ms=3.5, color=color, label=name)
entropies.set_ylabel("matrix entropy (nats)")
entropies.set_ylim(0, math.log(576))
entropies.legend(frameon=False)
degrees = np.degrees(scores["curvature"])
bends.plot(depth, degrees, "o-", ms=3.5, color="#6a4c93")
bends.axhline(120, color="0.6", lw=1, ls=":")
bends.annotate("independent tokens", (depth[-1], 120), ha="right", va="bottom", color="0.4")
bends.set_ylabel("curvature (degrees)")
bends.set_xlabel("layer (0: the embedding)")

# %%
# The two entropies part from the first layer on. What tokens have in common grows with depth, and without centring it
# is most of what is seen; their differences keep spreading over as many directions as before.
#
# Curvature: the embedding of one token says next to nothing of the next, and its path turns by about 120 degrees, as
# that of independent tokens does. Layer by layer the model straightens paths until the middle, by some six degrees, and
# then keeps them so.
