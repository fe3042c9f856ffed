"""
Training checkpoints
====================

How early does a network look like its final self? A small byte-level Llama is trained from scratch, and its
checkpoints are compared with the last one, layer by layer.
"""

from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
from train_checkpoints import train

from tdprobe import compare_layers, hf
from tdprobe.viz import curves

# %%
# Six checkpoints
# ---------------
#
# ``train_checkpoints.py`` lies next to this file. It trains 200,000 parameters for 400 steps, half a minute on one
# core, and leaves six ordinary model folders.

folder = TemporaryDirectory()
paths = train(folder.name)
checkpoints = {path.name.replace("-", " "): path for path in paths}
print(*checkpoints, sep=", ")

# %%
# All layers against all layers, across checkpoints
# -------------------------------------------------
#
# A checkpoint is a folder, a name on the Hub such as ``"owner/model@revision"``, or a model object. Each reads the
# same sentences with its own tokenizer. Without a pattern, the layers are the model's repeated blocks.

texts = hf.read_texts("demo", limit=64)
table = compare_layers(checkpoints, texts, max_length=256, progress=False)
table

# %%
# Similarity to the final checkpoint
# ----------------------------------
#
# The diagonal of a matrix between two checkpoints compares each layer with itself at the other step. It rises with
# every checkpoint, in every layer, and the first layer is ahead of the others all the way.

final = table.checkpoints[-1]
layers = table.layers(final)
similarity = {
    layer: [table.matrix("cka", step, final)[place, place] for step in table.checkpoints]
    for place, layer in enumerate(layers)
}
steps = [step.removeprefix("step ") for step in table.checkpoints]
fig, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
curves(similarity, steps, axis="training step", ax=ax)
ax.set_ylabel("cka with the final checkpoint")

# %%
# The whole matrices tell more. At the start, no layer resembles any final layer. At step 100, all of them resemble the
# first final layer most. By step 200 the layers have found their places: each resembles its own final form most, or
# that of a neighbour.

fig, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
for ax, step in zip(axes, ("step 0", "step 100", "step 200"), strict=True):
    table.plot("cka", step, final, ax=ax)

# %%
# Many checkpoints, little memory
# -------------------------------
#
# With ``one_at_a_time=True`` only one checkpoint is loaded at any time. Each leaves a sample of its rows behind,
# the same rows in all, and the samples are compared at the end. It is chosen by itself where the checkpoints would
# fill more than half of the free memory. The scores differ somewhat, because the sample is compared all at once and
# the stream in portions of 512 rows; both are explained on the page about comparing checkpoints.

frugal = compare_layers(checkpoints, texts, max_length=256, one_at_a_time=True, progress=False)
gap = abs(table.cube().values - frugal.cube().values).max()
print(f"{table.blocks[0].n} rows against a sample of {frugal.blocks[0].n};", f"largest difference: {gap:.3f}")
folder.cleanup()
