"""
Patching
========

Where in a language model does a fact pass through? Activations of a run that says *Paris* are put into a run that
says *Rome*, one layer and one token at a time, and the answer shows which of them carry the country.
"""

import matplotlib.pyplot as plt
import torch

from tdprobe import hf
from tdprobe.latent import ActivationPatching

# %%
# Two prompts that differ in one token
# ------------------------------------
#
# The measure is the difference of two logits at the end of the prompt, *Paris* over *Rome*. It is high for the clean
# prompt and low for the other; a patch that recovers all of it has carried over everything that decides the answer.

demo = hf.load("demo", dtype="float32")
model, tokenizer = demo.model, demo.tokenizer
clean = tokenizer("The capital of France is", return_tensors="pt")
other = tokenizer("The capital of Italy is", return_tensors="pt")
paris, rome = (tokenizer(city)["input_ids"][0] for city in (" Paris", " Rome"))


def difference(output):
    return output.logits[:, -1, paris] - output.logits[:, -1, rome]


with torch.no_grad():
    high, low = difference(model(**clean)).item(), difference(model(**other)).item()
print(f"clean {high:.2f}, other {low:.2f}")

# %%
# One patch
# ---------
#
# ``patch`` runs the clean prompt up to layer 10, puts what that layer gives at the country into the run on the other
# prompt, and returns the output of that run. Nothing else is changed, and the model now answers for France.

with torch.no_grad(), ActivationPatching(["model.layers[10]"], tokens=3).prepare(model) as hooked:
    patched = hooked.patch(clean, other)
answer = tokenizer.decode(patched.logits[0, -1].argmax())
print("Rome becomes", answer)

# %%
# Every layer and every token
# ---------------------------
#
# ``sweep`` needs one clean run for all of the 30 x 5 sites, and patches them as rows of common batches.

with ActivationPatching(["model.layers[:]"]).prepare(model) as hooked:
    found = hooked.sweep(clean, other, difference)[:, 0]
recovered = (found - low) / (high - low)

layer, position = divmod(int(recovered.argmax()), recovered.shape[1])
words = [word.replace("Ġ", "") for word in tokenizer.convert_ids_to_tokens(other["input_ids"][0])]
print(f"best: layer {layer} at {words[position]!r}, {recovered.max():.0%} recovered")

# %%
# Up to layer 22 all that tells the two prompts apart stays where the country is written. Layer 23 moves it to the
# last token, from which the answer is read. Nothing before the country matters, and nothing can: causal attention
# never lets it see what comes later.

fig, ax = plt.subplots(figsize=(4.6, 6.4), layout="constrained")
image = ax.imshow(recovered, cmap="RdBu", vmin=-1, vmax=1, origin="lower", aspect="auto")
ax.set_xticks(range(len(words)), words)
ax.set_xlabel("patched token")
ax.set_ylabel("patched layer")
ax.set_title("Paris over Rome: share recovered", loc="left", fontsize=11)
bar = fig.colorbar(image, ax=ax, shrink=0.6)
bar.set_label("0: as without a patch, 1: as in the clean run")

# %%
# Attention or MLP
# ----------------
#
# The same for the two parts of each layer at the last token: the paths name modules of the model, and ``tokens`` says
# which positions are patched. One module does it: the attention of layer 23 fetches the country to the last token.

parts = {"attention": "model.layers[:].self_attn", "MLP": "model.layers[:].mlp"}
shares = {}
fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
for name, path in parts.items():
    with ActivationPatching([path], tokens="last").prepare(model) as hooked:
        found = hooked.sweep(clean, other, difference)[:, 0, -1]
    shares[name] = (found - low) / (high - low)
    ax.plot(shares[name], marker="o", markersize=3, label=name)
ax.axhline(0, color="0.7", linewidth=0.8)
ax.set_xlabel("patched layer")
ax.set_ylabel("share recovered")
ax.legend(frameon=False)
