"""
Training checkpoints
====================

How early does a network look like its final self? A small byte-level Llama is trained from scratch, and its
checkpoints are compared with the last one, layer by layer, by four measures that need not agree.
"""

from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
from train_checkpoints import train

from tdprobe import compare_layers, hf
from tdprobe.latent import InformationImbalanceEstimator, MutualKnnEstimator
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
# same sentences with its own tokenizer. Without a pattern, the layers are the model's repeated blocks. Linear CKA and
# Procrustes angles compare geometry as a whole; the share of common neighbours and the information imbalance look at
# nearest neighbours only, in a bank of 1,024 tokens that both read. One pass serves all four.

texts = hf.read_texts("demo", limit=64)
neighbours = {"bank_size": 1024, "mode": "robust"}
measures = ["cka", "procrustes", MutualKnnEstimator(**neighbours), InformationImbalanceEstimator(**neighbours)]
table = compare_layers(checkpoints, texts, estimators=measures, max_length=256, progress=False)
table

# %%
# Similarity to the final checkpoint
# ----------------------------------
#
# The diagonal of a matrix between two checkpoints compares each layer with itself at the other step. The bands are two
# standard errors, from groups of tokens that are left out in turn.

final = table.checkpoints[-1]
layers = table.layers(final)
steps = [step.removeprefix("step ") for step in table.checkpoints]


def over_training(measure, what):
    """Return by layer how each step compares with the final one: ``"values"``, or their errors ``"se"``."""
    matrices = [getattr(table.block(measure, step, final), what) for step in table.checkpoints]
    return {layer: [matrix[place, place] for matrix in matrices] for place, layer in enumerate(layers)}


similarity = {measure: over_training(measure, "values") for measure in table.estimators}
errors = {measure: over_training(measure, "se") for measure in table.estimators}

fig, axes = plt.subplots(2, 2, figsize=(11.5, 7), sharex=True, layout="constrained")
for ax, (measure, found) in zip(axes.flat, similarity.items(), strict=True):
    direction = "down" if measure in ("procrustes", "information_imbalance") else "up"
    label = f"{measure} (similar: {direction})"
    curves(found, steps, axis="training step", estimator=label, errors=errors[measure], ax=ax)
for ax in axes.flat[[0, 2, 3]]:
    ax.get_legend().remove()

# %%
# All four agree that the first layer is ahead of the others all the way, and that every step brings every layer closer.
# They do not agree on when. By CKA all layers are half-way there at step 25; of the ten nearest tokens hardly a fifth
# are the right ones by then, and at step 200, where CKA is above 0.9, still only half to two thirds. Neighbours settle
# last. Information imbalance asks for less, that the nearest token of then be near in the end, and is almost down by
# step 200. Of an untrained first layer it is small already: equal bytes are neighbours before and after.
#
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
gap = abs(table.cube("cka").values - frugal.cube().values).max()
print(
    f"{table.block('cka', final, final).n} rows against a sample of {frugal.blocks[0].n};",
    f"largest difference: {gap:.3f}",
)
folder.cleanup()
