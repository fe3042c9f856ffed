"""
Steering
========

Turn a handful of contrasting sentences into a direction, add it at one layer, and read what the model writes then.
"""

import matplotlib.pyplot as plt
import torch

from tdprobe import hf
from tdprobe.latent import ActivationAddition, SteeringVectors

# %%
# A direction from contrast pairs
# -------------------------------
#
# ``ActivationAddition`` runs both sides and takes the difference of the mean activations, here over all real tokens
# but the first. Only the layers up to 14 run, because nothing after them is needed.

demo = hf.load("demo", dtype="float32")
model, tokenizer = demo.model, demo.tokenizer
LAYER = "model.layers[14]"
pairs = [
    ("I love this, it is wonderful", "I hate this, it is terrible"),
    ("What a great and happy day", "What an awful and sad day"),
    ("The food was delicious and the staff were kind", "The food was disgusting and the staff were rude"),
    ("A brilliant, moving film", "A boring, stupid film"),
    ("Everyone was delighted with the result", "Everyone was angry about the result"),
    ("She smiled and thanked us warmly", "She frowned and insulted us coldly"),
    ("The best holiday of my life", "The worst holiday of my life"),
    ("It works perfectly and I am so pleased", "It broke at once and I am so annoyed"),
]
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
positive, negative = (tokenizer(list(side), return_tensors="pt", padding=True) for side in zip(*pairs, strict=True))

addition = ActivationAddition([LAYER], tokens="mean", skip_first=1, early_stop=True)
with torch.no_grad(), addition.prepare(model) as hooked:
    direction = hooked.contrast(positive, negative)["steer", LAYER]
print(f"{len(pairs)} pairs, a vector of {direction.numel()} numbers and length {direction.norm():.1f}")

# %%
# Steering ``generate()``
# -----------------------
#
# Inside the block every call of the model is steered, the steps of ``generate()`` as well. The model likes the
# restaurant by itself; against the direction it no longer does.

prompt = tokenizer("I went to the new restaurant and the food was", return_tensors="pt")


def write(scale):
    with SteeringVectors([LAYER], vector=direction, scale=scale).prepare(model) as hooked:
        ids = hooked.generate(**prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :]).strip().replace("\n", " ")


texts = {scale: write(scale) for scale in (0, -2)}
for scale, text in texts.items():
    print(f"{scale:+d} x the direction: ... {text}")

# %%
# With 0 the model computes bit for bit what it computes without hooks.

plain = model(**prompt).logits
with SteeringVectors([LAYER], vector=direction, scale=0).prepare(model) as hooked:
    same = torch.equal(hooked(**prompt).logits, plain)
print("0 x the direction changes nothing:", same)

# %%
# How strong, and on which tokens
# -------------------------------
#
# One word tells how much: the odds of *good* words against *bad* ones as the next word. ``tokens`` says where the
# direction is added. Every real token moves the odds most; the last token of the prompt moves them for the next word,
# the first token hardly at all. In ``generate()``, ``"prompt"`` and ``"generated"`` can be told apart as well.

good = [tokenizer(word)["input_ids"][0] for word in (" great", " good", " amazing", " delicious", " excellent")]
bad = [tokenizer(word)["input_ids"][0] for word in (" bad", " terrible", " awful", " disgusting", " horrible")]
scales = list(range(-4, 5))
odds = {}

fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for tokens in ("all", "last", 0):
    odds[tokens] = []
    for scale in scales:
        steering = SteeringVectors([LAYER], vector=direction, scale=scale, tokens=tokens)
        with torch.no_grad(), steering.prepare(model) as hooked:
            chances = hooked(**prompt).logits[0, -1].log_softmax(-1)
        odds[tokens].append((chances[good].logsumexp(0) - chances[bad].logsumexp(0)).item())
    ax.plot(scales, odds[tokens], marker="o", markersize=3, label=f"tokens={tokens!r}")
ax.axhline(0, color="0.7", linewidth=0.8)
ax.set_xlabel("scale of the direction")
ax.set_ylabel("log odds, good : bad words")
ax.legend(frameon=False)
