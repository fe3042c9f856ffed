"""
Two models, two widths, two tokenizers
======================================

Do a language model and a sentence encoder that have nothing in common but the language find the same texts alike?
SmolLM2-135M (30 layers of width 576, 49,152 tokens) against MiniLM-L6 (6 layers of width 384, 30,522 tokens), every
layer of one with every layer of the other.
"""

import matplotlib.pyplot as plt

from tdprobe import compare_layers, hf
from tdprobe.viz import curves, heatmap

# %%
# One row per text
# ----------------
#
# The two tokenizers cut a text into different pieces, so tokens cannot be paired, but texts can: ``tokens="mean"``
# makes one row of each. ``compare_layers`` gives each model the same texts and pairs the rows. None of these measures
# asks for equal widths: CKA compares the similarities of all pairs of texts, mutual kNN the ten nearest texts of each
# text, information imbalance how near the nearest text of one layer is in the other. Embeddings are layer 0.

texts = hf.read_texts("demo", limit=128)
models = {"SmolLM2": "demo", "MiniLM": "demo-encoder"}
patterns = {"SmolLM2": r"model\.(embed_tokens|layers\.\d+)$", "MiniLM": r"embeddings$|encoder\.layer\.\d$"}
measures = ["cka", "mutual_knn", "information_imbalance"]
table = compare_layers(models, texts, patterns, measures, tokens="mean", progress=False)
table

# %%
# Who resembles whom
# ------------------
#
# Unrelated layers would score 0, 0 and 1: the first two are corrected for chance.

fig, axes = plt.subplots(3, 1, figsize=(10, 9), layout="constrained")
for ax, measure in zip(axes, measures, strict=True):
    block = table.block(measure, "MiniLM", "SmolLM2")
    depths = [[str(layer) for layer in range(len(names))] for names in (block.layers_a, block.layers_b)]
    owners = {"checkpoint_a": "MiniLM", "checkpoint_b": "SmolLM2"}
    heatmap(block.values, *depths, estimator=measure, **owners, title=f"{measure} (n = {block.n} texts)", ax=ax)
# Bright is similar: here small values are.
ax.images[0].set_cmap("viridis_r")

# %%
# By CKA and by common neighbours the closest are layers 2 and 3 of MiniLM, half-way through it, and layers 15 to 18 of
# SmolLM2, also half-way: half of the ten nearest texts are the same. MiniLM's last layer, which training has bent
# towards one vector per sentence, stands apart; it resembles the last but two of SmolLM2 most. By CKA, the deeper a
# layer of MiniLM, the deeper its best match:

cka = table.matrix("cka", "MiniLM", "SmolLM2")
print("best match of each layer of MiniLM:", *cka.argmax(1))

# %%
# In layer 3 of SmolLM2, CKA with MiniLM falls to a third of what it was in layer 1, common neighbours to two thirds,
# and both recover by layer 10. A few words have very long rows there (:doc:`plot_01_layers_of_a_language_model`).
# They decide a similarity of all pairs of texts, and less so who is next to whom.
#
# What one knows of the other
# ---------------------------
#
# Information imbalance has a direction. From layers 3 to 9 of SmolLM2 one finds the neighbours in the middle of MiniLM
# well, but not the other way round: what those layers add makes texts neighbours of which MiniLM knows nothing. From
# layer 12 on, both know about equally much. Bands are two standard errors.

there, back = (table.block("information_imbalance", *pair) for pair in (("SmolLM2", "MiniLM"), ("MiniLM", "SmolLM2")))
place = next(i for i, name in enumerate(there.layers_b) if name.endswith("encoder.layer.2"))
directions = {"SmolLM2 to MiniLM, layer 3": there.values[:, place], "back": back.values[place]}
errors = {"SmolLM2 to MiniLM, layer 3": there.se[:, place], "back": back.se[place]}
depths = [str(layer) for layer in range(len(there.layers_a))]
fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
curves(directions, depths, axis="layer of SmolLM2", estimator="information imbalance", errors=errors, ax=ax)
