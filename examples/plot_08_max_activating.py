"""
What a unit waits for, and where a head looks
=============================================

The sentences that excite single units of a language model most, found in one pass over a corpus, and the attention
patterns of single heads.
"""

import matplotlib.pyplot as plt
import torch

from tdprobe import hf
from tdprobe.latent import AttentionPatterns, MaxActivating
from tdprobe.latent.max_activating import text_around

# %%
# One pass, eight tokens per unit
# -------------------------------
#
# ``MaxActivating`` keeps the largest activations of each of the 1536 units of a feed-forward layer, and the sentence
# and position of each. Nothing else is kept, whatever the size of the corpus. The pass ends at layer 8.

demo = hf.load("demo")
model, tokenizer = demo.model, demo.tokenizer
texts = hf.read_texts("demo", limit=400)
LAYER = "model.layers.8.mlp.act_fn"

with torch.no_grad(), MaxActivating(LAYER.replace(".", r"\.") + "$", k=8, early_stop=True).prepare(model) as hooked:
    for batch in hf.batches(texts, tokenizer, sort_by_length=True):
        hooked.hooking_context.set_sample_ids(batch.ids)
        hooked(batch.inputs)

samples = hooked.hooking_context.samples()
print(int(samples.state.n), "tokens,", len(samples.values(LAYER)), "units")

# %%
# Units with a topic
# ------------------
#
# Ordered by their eighth largest activation, the units that fire often and strongly come first. Four of the first
# hundred, with the text around each activation: money, sound, fun, and places.

strongest = samples.values(LAYER)[:, -1].argsort(descending=True).tolist()
units = [349, 430, 1008, 1199]
words = {
    unit: [text_around(tokenizer, texts[a.sample], a.position)[1].strip() for a in samples.of(LAYER, unit)]
    for unit in units
}


def draw(ax, unit):
    """Write one line per activation: the token in a box as dark as it is strong, between its neighbours."""
    found = samples.of(LAYER, unit)
    for line, activation in enumerate(found):
        before, token, after = text_around(tokenizer, texts[activation.sample], activation.position, width=5)
        shade = plt.colormaps["Oranges"](0.75 * activation.value / found[0].value)
        box = {"facecolor": shade, "edgecolor": "none", "pad": 1.5}
        style = {"fontsize": 8.5, "va": "center", "parse_math": False}
        ax.text(0.5, -line, token.strip() or repr(token), ha="center", bbox=box, **style)
        # The first piece may be the rest of a word.
        ax.text(0.4, -line, before.partition(" ")[2][-34:], ha="right", color="0.3", **style)
        ax.text(0.6, -line, after[:34].rstrip(), ha="left", color="0.3", **style)
        ax.text(1.17, -line, f"{activation.value:.1f}", ha="right", color="0.5", **style)
    ax.set(xlim=(-0.17, 1.17), ylim=(0.6 - len(found), 0.6))
    ax.set_title(f"unit {unit}, number {strongest.index(unit) + 1} of {len(strongest)}", loc="left", fontsize=10)
    ax.axis("off")


fig, axes = plt.subplots(2, 2, figsize=(13, 5), layout="constrained")
for ax, unit in zip(axes.flat, units, strict=True):
    draw(ax, unit)

# %%
# Where heads look
# ----------------
#
# Fused attention never forms the weights. ``AttentionPatterns`` switches the model to the plain formula while the block
# lasts; each row of what it caches sums to one. The text says everything twice.

text = "The old sailor Ahab feared a white whale." * 2
encoding = tokenizer(text, return_tensors="pt")
with torch.no_grad(), AttentionPatterns(early_stop=True).prepare(model) as hooked:
    hooked(encoding)

patterns = torch.stack([weights[0] for weights in hooked.hooking_context.cache.values()])
n_layers, n_heads, n_tokens, _ = patterns.shape
half = n_tokens // 2

# %%
# Three kinds of heads, each found by what it looks at on average: the token before; the token *after* the earlier
# copy of this one, as an induction head does, which knows what comes next; and the first token, where heads look that
# have nothing to do.

rows = torch.arange(half, n_tokens)
habits = {
    "the token before": patterns[:, :, rows, rows - 1].mean(-1),
    "what came next last time": patterns[:, :, rows, rows - half + 1].mean(-1),
    "the first token": patterns[:, :, rows, 0].mean(-1),
}
best = {habit: divmod(score.argmax().item(), n_heads) for habit, score in habits.items()}

tokens = [tokenizer.decode(token).strip() for token in encoding["input_ids"][0]]
fig, axes = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained", sharey=True)
for ax, (habit, (layer, head)) in zip(axes, best.items(), strict=True):
    image = ax.imshow(patterns[layer, head], cmap="magma_r", vmin=0, vmax=1)
    ax.set_xticks(range(n_tokens), tokens, rotation=90, fontsize=8)
    ax.set_yticks(range(n_tokens), tokens, fontsize=8)
    ax.set_title(f"{habit}: layer {layer}, head {head}", loc="left", fontsize=10)
    ax.set_xlabel("looks at")
axes[0].set_ylabel("token")
fig.colorbar(image, ax=axes, label="attention weight", shrink=0.8)

for habit, (layer, head) in best.items():
    print(f"{habit}: {habits[habit][layer, head]:.2f} of the weight (layer {layer}, head {head})")
