"""
Layers of a language model
==========================

Which layers of a language model hold the same information? Linear CKA between every two of the 30 layers of
SmolLM2-135M answers in one pass over the text, and a handful of tokens can change the answer completely.
"""

from contextlib import ExitStack

import matplotlib.pyplot as plt
import torch

from tdprobe import ActivationCaching, LayerScoring, hf
from tdprobe.viz import curves

# %%
# A model, a text, a pattern
# --------------------------
#
# ``"demo"`` names the embedded model and the shipped corpus of 800 rated sentences; 64 of them will do here. A
# regular expression says which modules are layers. ``tdprobe layers demo`` lists what can be named.

demo = hf.load("demo")
texts = hf.read_texts("demo", limit=64)
batches = hf.batches(texts, demo.tokenizer, batch_size=16)
LAYERS = r"model\.layers\.\d+$"

# %%
# Four choices of tokens in one pass
# ----------------------------------
#
# Contexts stack: four scorings listen to the same forward passes. They differ in the rows that count. The first
# takes every real token; the second leaves out the first token of each text; the last two also leave out rows that
# are longer than 10 or 4 times the median length of the rows of some layer.

choices = {
    "every token": LayerScoring(LAYERS, skip_first=0, max_norm=None),
    "without the first token": LayerScoring(LAYERS, skip_first=1, max_norm=None),
    "and rows up to 10 medians": LayerScoring(LAYERS, skip_first=1, max_norm=10),
    "and rows up to 4 medians": LayerScoring(LAYERS, skip_first=1, max_norm=4),
}
with torch.no_grad(), ExitStack() as stack:
    hooked = [stack.enter_context(choice.prepare(demo.model)) for choice in choices.values()]
    for batch in batches:
        demo.model(**batch.inputs)

scored = [module.scores() for module in hooked]
tables = dict(zip(choices, scored, strict=True))
for name, table in tables.items():
    print(f"{name:26} {table.blocks[0].n:5} rows,", f"cka of layers 10 and 15: {table.matrix()[10, 15]:.2f}")

# %%
# Four pictures of the same layers, over nearly the same tokens. Without the first token, one word decides everything
# above layer 10. With a limit of 10 median lengths, fewer than fifty short words still tie layers 2 to 8
# together and cut them off from the rest. Without those, similarity falls off smoothly with the distance in depth.

fig, axes = plt.subplots(2, 2, figsize=(11, 9.4), layout="constrained")
for ax, (name, table) in zip(axes.flat, tables.items(), strict=True):
    table.plot(ax=ax)
    ax.set_title(f"{name} (n = {table.blocks[0].n})", loc="left", fontsize=11)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(range(0, 30, 5), range(0, 30, 5))

# %%
# Where the long rows are
# -----------------------
#
# The length of a row is the norm of one token's activation. ``ActivationCaching`` takes the same ``tokens=`` clause:
# position 0 of every text, and everything after it.

batch = next(iter(hf.batches(texts, demo.tokenizer, batch_size=64)))
with (
    torch.no_grad(),
    ActivationCaching(LAYERS, tokens=0).prepare(demo.model) as first,
    ActivationCaching(LAYERS, tokens="1:").prepare(demo.model) as rest,
):
    demo.model(**batch.inputs)

names = tables["every token"].layers()
first_length = torch.stack([first.hooking_context.cache[name].norm(dim=-1) for name in names])
rest_length = torch.stack([rest.hooking_context.cache[name].norm(dim=-1) for name in names])
lengths = {
    "first token, median": first_length.median(1).values,
    "other tokens, median": rest_length.median(1).values,
    "other tokens, 98th percentile": rest_length.quantile(0.98, dim=1),
    "other tokens, longest": rest_length.max(1).values,
}
fig, ax = plt.subplots(figsize=(8, 4.4), layout="constrained")
curves(lengths, names, estimator="length of the row", ax=ax)
ax.set_yscale("log")

# %%
# From layer 11 on, the first token of every text is more than a hundred times longer than the others, always in the
# same direction, and so is a single word here and there. In layers 2 to 8, the word *the* and lone spaces are five to
# ten times longer. Such massive activations (`Sun et al. 2024 <https://arxiv.org/abs/2402.17762>`_) are real, but
# they carry next to nothing about the text, and in CKA a row that is ten times longer weighs ten thousand times more.
#
# The longest row of layer 15 in this batch belongs to the second token of *nikon*:

where = rest_length[15].argmax()
mask = batch.inputs["attention_mask"].bool()
mask[torch.arange(len(mask)), mask.int().argmax(1)] = False
token = batch.inputs["input_ids"][mask][where]
print(repr(demo.tokenizer.decode(token)), f"{rest_length[15, where]:.0f}")

# %%
# Similarity to the last layer
# ----------------------------
#
# One row of the matrix is a curve over depth: how much of the last layer's geometry is there already? It grows slowly
# over two thirds of the depth, faster around layer 21, and the last layer is a step of its own.

table = tables["and rows up to 4 medians"]
to_last = table.matrix()[-1]
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
curves({"SmolLM2-135M": to_last}, names, estimator="cka with the last layer", ax=ax)

# %%
# The table prints as a summary, and exports: ``table.to_pandas()``, ``table.to_json(path)``, and
# ``table.report("layers.html")`` for an interactive page that works offline.

table
