"""
How little can an encoder be told?
==================================

A layer in front of MiniLM learns which words to blur: it leaves the encoder's verdict on a sentence as it is, and tells
as few nats about the words as it can. Its accuracy is drawn against the information that it lets through, beside two
layers that have learned nothing.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from torch import nn

from tdprobe import hf
from tdprobe.latent import MutualInformationSubBatch
from tdprobe.latent.information import kolchinsky_tracey_bounds

# %%
# A frozen judge
# --------------
#
# MiniLM, averaged over the tokens of a sentence, and a logistic regression on the ratings that people gave to the
# sentences of the shipped corpus. Neither changes from here on.

demo = hf.load("demo-encoder")
encoder = demo.model.requires_grad_(False)
corpus = hf.demo_corpus()
short = [row for row in corpus if len(demo.tokenizer(row["text"])["input_ids"]) <= 20]
order = torch.randperm(len(short), generator=torch.Generator().manual_seed(0)).tolist()
short = [short[i] for i in order]


def embedded(rows):
    """Return token ids, word embeddings, mask and ratings."""
    (batch,) = hf.batches([row["text"] for row in rows], demo.tokenizer, batch_size=len(rows))
    ids = batch.inputs["input_ids"]
    ratings = torch.tensor([row["score"] for row in rows])
    return ids, encoder.embeddings.word_embeddings(ids), batch.inputs["attention_mask"], ratings


ids, words, mask, score = embedded(short)
# Sentences without a clear rating have no label, and still serve to train the layer.
clear = score.abs() >= 1
test = clear & (clear.cumsum(0) <= 150)
fit = clear & ~test


def mean_over_tokens(values, mask):
    return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def features(embeddings, mask):
    return mean_over_tokens(encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state, mask)


with torch.no_grad():
    clean = features(words, mask)
judge = LogisticRegression(max_iter=1000).fit(clean[fit], score[fit] > 0)
direction, offset = torch.tensor(judge.coef_[0]).float(), float(judge.intercept_[0])


def verdict(embeddings, mask):
    return features(embeddings, mask) @ direction + offset


# %%
# A layer that blurs
# ------------------
#
# Every word embedding :math:`x` gets a gate :math:`g(x)` between 0 and 1 and becomes
# :math:`Y = \bar x + g(x) (x - \bar x) + \sigma \epsilon`: at 1 the word, with noise that the judge can bear; at 0
# noise around the average word. The gate looks at the tone of a word, which is read off averaged word embeddings once,
# test sentences left out. Three numbers are learned: how open gates are at all, how much strong words count, and how
# much good and bad ones differ.

real = words[mask.bool()]
centre, spread = real.mean(0), real.std(0)
sigma = 0.5 * spread
tested = {short[i]["text"] for i in test.nonzero()[:, 0].tolist()}
_, others, others_mask, ratings = embedded([r for r in corpus if abs(r["score"]) >= 1 and r["text"] not in tested])
averages = mean_over_tokens((others - centre) / spread, others_mask)
probe = LogisticRegression(C=0.05, max_iter=1000).fit(averages, ratings > 0)
tone = torch.tensor(probe.coef_[0]).float() / spread
tone = tone / ((real - centre) @ tone).std()


class Blur(nn.Module):
    """Gate word embeddings by their tone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 0.6)

    def forward(self, x):
        strength = (x - centre) @ tone
        # The factor makes gates open or closed: a word that is half blurred is recognised all the same.
        return (8 * self.linear(torch.stack([strength.abs() - 0.8, strength], -1))).sigmoid()


def channel(x, gate, generator):
    """Return the shift, the standard deviations of the noise, and the noisy embeddings."""
    means, stds = (gate - 1) * (x - centre), sigma.expand_as(x)
    return means, stds, x + means + stds * torch.randn(x.shape, generator=generator)


# %%
# Measured the same way for every layer
# -------------------------------------
#
# The accuracy on test sentences, of which the better half counts as good, since blur moves all verdicts to one side;
# and the Kolchinsky-Tracey bounds of the information for 256 of their tokens. That is log 256 = 5.5 nats at most, and
# less because words are repeated.

tokens = torch.randperm(int(mask[test].sum()), generator=torch.Generator().manual_seed(0))[:256]


@torch.no_grad()
def measure(gate):
    """Return the lower and upper bound in nats per token, and the accuracy over two draws of the noise."""
    generator, x, right = torch.Generator().manual_seed(0), words[test], []
    for _ in range(2):
        found = verdict(channel(x, gate, generator)[2], mask[test])
        right.append(((found > found.median()) == (score[test] > 0)).float().mean().item())
    centres = (x + (gate - 1) * (x - centre))[mask[test].bool()][tokens]
    return [bound.item() for bound in kolchinsky_tracey_bounds(centres, sigma)] + [sum(right) / len(right)]


def dealt(gates):
    """Deal the gates of all tokens anew: as many are open, but not for the words that they were meant for."""
    at = mask[test].bool()
    values = gates[at]
    shuffle = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    return gates.masked_scatter(at[..., None], values[shuffle])


# %%
# Training
# --------
#
# One run in which nats become more expensive step by step. ``MutualInformationSubBatch`` writes what they cost into the
# TensorDict; the task is to give each sentence the verdict that it had without noise.

torch.manual_seed(0)
blur, information = Blur(), MutualInformationSubBatch(conditional="sampled", symmetric=True)
optimizer = torch.optim.Adam(blur.parameters(), lr=0.04)
generator = torch.Generator().manual_seed(0)
pool = (~test & (mask.sum(1) <= 15)).nonzero()[:, 0]
target = (3 * (clean @ direction + offset)).sigmoid()
trained, shuffled, opened = [], [], []

for price in (0.001, 0.002, 0.003, 0.004, 0.006):
    for _ in range(8):
        rows = pool[torch.randperm(len(pool), generator=generator)[:16]]
        x, real_tokens = words[rows, :15], mask[rows, :15]
        means, stds, noisy = channel(x, blur(x), generator)
        td = TensorDict({"means": means, "stds": stds, "mask": real_tokens, "clean": x, "noisy": noisy})
        nats = information(td)["mutual_information_loss"]
        task = nn.functional.binary_cross_entropy_with_logits(3 * verdict(noisy, real_tokens), target[rows])
        optimizer.zero_grad()
        (task + price * nats).backward()
        optimizer.step()
    with torch.no_grad():
        gates = blur(words[test])
    trained.append(measure(gates))
    shuffled.append(measure(dealt(gates)))
    opened.append(gates[..., 0])

alike = [measure(torch.full_like(gates, gate)) for gate in (1.0, 0.4, 0.2, 0.12, 0.05)]

# %%
# Accuracy against information
# ----------------------------
#
# Each bar reaches from the lower to the upper bound. A gate that is the same for all words has to be nearly closed
# before anything is hidden, and by then the judge is at chance. The trained layer still tells good from bad where
# hardly a nat is left. The control has the very same gates, dealt to other words: what counts is which words are open.
# On the right, where nearly all is told, the layer and its control do not differ by more than chance: one standard
# error of an accuracy is 0.04.

fig, ax = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
styles = {
    "trained": (trained, "o-", "#2a6f97"),
    "same gates, dealt to other words": (shuffled, "s--", "#d1495b"),
    "one gate for all words": (alike, "^:", "0.45"),
}
for label, (points, style, colour) in styles.items():
    low, high, accuracy = torch.tensor(points).T
    middle = (low + high) / 2
    ax.errorbar(middle, accuracy, xerr=(high - low) / 2, fmt=style, color=colour, ms=5, capsize=2, label=label)
margin = 2 * 0.5 / int(test.sum()) ** 0.5
ax.axhspan(0.5 - margin, 0.5 + margin, color="0.92", lw=0, label="chance, 2 standard errors")
quiet = (clean @ direction + offset)[test]
quiet = ((quiet > quiet.median()) == (score[test] > 0)).float().mean().item()
ax.axhline(quiet, color="0.6", lw=1, ls=":", label="without noise")
ax.set_xlabel("information kept, nats per token (lower to upper bound)")
ax.set_ylabel(f"accuracy on {int(test.sum())} test sentences")
ax.set_title("Where little is told, a trained noise layer keeps more of the verdict", loc="left", fontsize=11)
ax.spines[["top", "right"]].set_visible(False)
ax.set_ylim(0.4, 1)
ax.legend(frameon=False, loc="upper left", ncols=2)

# %%
# The words that stay readable where information is scarce. They are nearly all bad ones: a sentence without any is
# good, so that the others need not be told.

at = mask[test].bool()
gate_of = dict(zip(ids[test][at].tolist(), opened[2][at].tolist(), strict=True))
readable = sorted(gate_of, key=gate_of.__getitem__, reverse=True)[:24]
readable = demo.tokenizer.convert_ids_to_tokens(readable)
print(" ".join(readable))
