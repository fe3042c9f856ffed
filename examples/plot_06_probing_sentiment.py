"""
Where sentiment can be read
===========================

Linear probes on every layer of a language model and of an encoder, for ratings that people gave to sentences, in one
pass per split and against probes that were trained on shuffled labels.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tdprobe import hf
from tdprobe.latent import ProbeManager, Probing
from tdprobe.viz import curves

# %%
# Sentences with a clear score
# ----------------------------
#
# Each sentence of the shipped corpus has the mean rating of twenty people, from -4 to 4. Those near zero are left
# out, and so are long ones, which keeps the padding of one large batch small. Three fifths are for training.

rated = [row for row in hf.demo_corpus() if abs(row["score"]) >= 1]
order = torch.randperm(len(rated), generator=torch.Generator().manual_seed(0)).tolist()
rated = [rated[i] for i in order]


def split(tokenizer):
    """Return the tokens and labels of the training and the test sentences."""
    rows = [row for row in rated if len(tokenizer(row["text"])["input_ids"]) <= 24]
    n_train = len(rows) * 3 // 5
    parts = {"fit": rows[:n_train], "predict": rows[n_train:]}
    for step_type, part in parts.items():
        (batch,) = hf.batches([row["text"] for row in part], tokenizer, batch_size=len(part))
        yield step_type, batch.inputs, torch.tensor([int(row["score"] > 0) for row in part])


# %%
# A probe and its controls
# ------------------------
#
# A ``ProbeManager`` makes one estimator per layer, here of scikit-learn. The control of a probe is the same probe
# trained on shuffled labels: what it scores is what the size of the layer and of the sample give away for free.
# Anything with a method ``step`` is a probe, so that one pass feeds the probe and four controls.

SHUFFLES = 4


def estimator():
    """Return an unfitted probe: 576 numbers per sentence and 200 sentences ask for a strong penalty."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))


def accuracy(predictions, labels):
    return {"accuracy": (torch.as_tensor(predictions) == labels).float().mean().item()}


class WithControls:
    """Hand the same rows to a probe and to its controls, which are fitted on shuffled labels."""

    def __init__(self, probe, *controls):
        self.probe, self.controls = probe, controls

    def step(self, data, labels, step_type):
        self.probe.step(data, labels=labels, step_type=step_type)
        for seed, control in enumerate(self.controls):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            control.step(data, labels=labels[order] if step_type == "fit" else labels, step_type=step_type)


# %%
# One pass per split
# ------------------
#
# ``tokens`` selects by the attention mask: a language model has read the whole sentence at its last token, an encoder
# is usually averaged. ``labels`` and ``step_type`` go to the probes, never to the model. Nobody needs the output
# matrix, so the pass ends after the last layer.


def probe_layers(model, tokenizer, pattern, tokens):
    """Return accuracies on the test sentences, by layer, of the probe and of each control."""
    managers = [ProbeManager(estimator, {}, accuracy) for _ in range(1 + SHUFFLES)]
    probing = Probing(
        pattern,
        lambda name, direction: WithControls(*(m.probe_factory(name, direction) for m in managers)),
        additional_keys=["labels", "step_type"],
        tokens=tokens,
        early_stop=True,
    )
    with torch.no_grad(), probing.prepare(model) as hooked:
        for step_type, inputs, labels in split(tokenizer):
            hooked(inputs, labels=labels, step_type=step_type)
    scores = [[metrics["accuracy"] for metrics in m.predict_metrics.values()] for m in managers]
    return torch.tensor(scores), len(labels)


demo, encoder = hf.load("demo"), hf.load("demo-encoder")
results = {
    "SmolLM2-135M, last token": probe_layers(
        demo.model, demo.tokenizer, r"model\.embed_tokens$|model\.layers\.\d+$", "last"
    ),
    "MiniLM-L6, mean of the tokens": probe_layers(
        encoder.model, encoder.tokenizer, r"embeddings$|encoder\.layer\.\d+$", "mean"
    ),
}

# %%
# Accuracy by layer
# -----------------
#
# Position 0 is the embedding. The last token of a sentence alone, often a full stop, says nothing about sentiment;
# what the model knows of the sentence arrives there layer by layer, and is all there half-way up. The averaged word
# vectors of the encoder tell most of it from the start. Controls stay around one half: the grey band is two standard
# errors of a coin that is tossed once per test sentence.

fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained", width_ratios=[2, 1])
for ax, (name, (scores, n_test)) in zip(axes, results.items(), strict=True):
    margin = 2 * 0.5 / n_test**0.5
    ax.axhspan(0.5 - margin, 0.5 + margin, color="0.9", lw=0)
    curves({"probe": scores[0], "shuffled labels": scores[1:].mean(0)}, title=f"{name} (n = {n_test})", ax=ax)
    ax.set_ylabel("accuracy on the test sentences" if ax is axes[0] else "")
    ax.set_ylim(0.35, 1)
axes[0].get_legend().remove()

for name, (scores, _) in results.items():
    best = scores[0].argmax().item()
    print(f"{name}: {scores[0, best]:.0%} at position {best}; controls {scores[1:].mean():.0%} on average")
