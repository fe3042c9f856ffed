"""
Caching, generate and early stop
================================

Read activations out of a model while it answers, decode every layer as if it were the last, and end a pass early
when only the first layers are wanted.
"""

import matplotlib.pyplot as plt
import torch

from tdprobe import ActivationCaching, hf

# %%
# One call
# --------
#
# Inside the block the model is called as ever, here with what the tokenizer returns. The cache is a TensorDict from
# module names to the modules' own tensors.

demo = hf.load("demo")
model, tokenizer = demo.model, demo.tokenizer
LAYERS = r"model\.layers\.\d+$"
encoding = tokenizer("The capital of France is", return_tensors="pt")

with torch.no_grad(), ActivationCaching(LAYERS).prepare(model) as hooked:
    output = hooked(**encoding)

cache = hooked.hooking_context.cache
print(len(cache.keys()), "layers;", "model.layers.15:", tuple(cache["model.layers.15"].shape))

# %%
# ``generate()``
# --------------
#
# The first pass of ``generate()`` reads the prompt, every later one a single new token. ``occurrences="all"`` keeps
# them all, each with its phase.

with torch.no_grad(), ActivationCaching(LAYERS, occurrences="all").prepare(model) as hooked:
    ids = hooked.generate(**encoding, max_new_tokens=8, do_sample=False)

context = hooked.hooking_context
shapes = [tuple(value.shape) for value in context.occurrences["model.layers.29"]]
phases = context.phases["model.layers.29"]
print(tokenizer.decode(ids[0]))
print(*zip(phases, shapes, strict=True), sep="\n")

# %%
# Every layer read as if it were the last: its state goes through the final norm and the output matrix, which gives
# the probability of the token that the model went on to write (the *logit lens*). The full stop and the line breaks
# are settled half-way up; *Paris* appears in the very last layers.

new = ids[0, encoding["input_ids"].shape[1] :]
probability = torch.zeros(len(new), 30)
with torch.no_grad():
    for layer in range(30):
        passes = context.occurrences[f"model.layers.{layer}"]
        states = torch.cat([value[:, -1] for value in passes])
        odds = model.lm_head(model.model.norm(states)).softmax(-1)
        probability[:, layer] = odds[torch.arange(len(new)), new]

fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
image = ax.imshow(probability, cmap="viridis", vmin=0, vmax=1, aspect="auto")
ax.set_yticks(range(len(new)), [repr(tokenizer.decode(token)) for token in new])
ax.set_xlabel("layer")
ax.set_ylabel("generated token")
fig.colorbar(image, label="probability of that token")

# %%
# Early stop
# ----------
#
# Who wants layer 9 only does not need the other twenty. With ``early_stop=True`` a call of the hooked module ends
# after the last matched module; there is no output then, and the cached values are the same.

with torch.no_grad():
    with ActivationCaching(r"model\.layers\.9$", early_stop=True).prepare(model) as short:
        nothing = short(**encoding)
    stopped = short.hooking_context.cache["model.layers.9"]

print("output:", nothing, "  same activation:", torch.equal(stopped, cache["model.layers.9"]))

# %%
# Plain hooks on every layer show what ran: ten layers of thirty. (A second context of tdprobe that reads later layers
# would get them: an early stop never takes rows from other observers.)

ran, handles = [], []
for name, module in model.named_modules():
    if name.startswith("model.layers.") and name.count(".") == 2:
        handles.append(module.register_forward_hook(lambda *_, name=name: ran.append(name)))
with torch.no_grad(), ActivationCaching(r"model\.layers\.9$", early_stop=True).prepare(model) as short:
    short(**encoding)
for handle in handles:
    handle.remove()

print(len(ran), "layers ran")

# %%
# Padding and token selection
# ---------------------------
#
# In a batch, ``[:, -1]`` is a pad for every text but the longest. ``tokens="last"`` reads the attention mask:
# the row of each text is the one that the text has by itself.

tokenizer.padding_side = "right"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
pair = tokenizer(["The capital of France is", "Hello"], padding=True, return_tensors="pt")
with torch.no_grad(), ActivationCaching(r"model\.layers\.9$", tokens="last").prepare(model) as hooked:
    hooked(**pair)

rows = hooked.hooking_context.cache["model.layers.9"]
difference = (rows[0] - stopped[0, -1]).norm() / stopped[0, -1].norm()
print("rows:", tuple(rows.shape), f"  difference to the text by itself: {difference:.0e}")
