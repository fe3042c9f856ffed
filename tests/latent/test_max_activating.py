from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tdprobe import hf
from tdprobe.latent import ActivationCaching, MaxActivating
from tdprobe.latent.max_activating import text_around

TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
LAYER = r"model\.layers\.[12]\.mlp\.act_fn$"
NAMES = ("model.layers.1.mlp.act_fn", "model.layers.2.mlp.act_fn")


def padded(texts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, texts))
    rows = [[0] * (width - len(t)) + t if side == "left" else t + [0] * (width - len(t)) for t in texts]
    return {"input_ids": torch.tensor(rows), "attention_mask": (torch.tensor(rows) != 0).long()}


def brute_force(model: nn.Module, name: str, unit: int, k: int, skip_first: int = 1) -> list[tuple[float, int, int]]:
    """Run every text alone, and sort all activations of one unit."""
    found = []
    for sample, text in enumerate(TEXTS):
        with ActivationCaching(LAYER).prepare(model) as hooked, torch.no_grad():
            hooked(input_ids=torch.tensor([text]))
        values = hooked.hooking_context.cache[name][0, :, unit].tolist()
        found += [(value, sample, position) for position, value in enumerate(values) if position >= skip_first]
    return sorted(found, key=lambda item: -item[0])[:k]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"skip_first": 0}])
def test_the_largest_activations_and_their_places(tiny_llama: nn.Module, side: str, options: dict[str, Any]) -> None:
    with MaxActivating(LAYER, k=3, early_stop=True, **options).prepare(tiny_llama) as hooked, torch.no_grad():
        for start in (0, 2):
            hooked(padded(TEXTS[start : start + 2], side))
    samples = hooked.hooking_context.samples()
    assert samples.layers == NAMES and int(samples.state.n) == sum(map(len, TEXTS)) - 4 * (not options)
    for name in NAMES:
        for unit in (0, 17, 63):
            expected = brute_force(tiny_llama, name, unit, 3, **options)
            found = samples.of(name, unit)
            assert [(a.sample, a.position) for a in found] == [(sample, position) for _, sample, position in expected]
            assert [a.value for a in found] == pytest.approx([value for value, *_ in expected], abs=1e-5)
    assert samples.values(NAMES[0]).shape == (64, 3)


def test_samples_keep_their_numbers_and_shards_merge(tiny_llama: nn.Module) -> None:
    def search(order: list[int]) -> Any:
        with MaxActivating(LAYER, k=4).prepare(tiny_llama) as hooked, torch.no_grad():
            for sample in order:
                hooked.hooking_context.set_sample_ids(torch.tensor([sample]))
                hooked(input_ids=torch.tensor([TEXTS[sample]]))
        return hooked.hooking_context.samples()

    whole, shards = search([0, 1, 2, 3]), search([3, 1]).merge(search([2, 0, 1]))
    for unit in range(64):
        assert shards.of(NAMES[1], unit) == whole.of(NAMES[1], unit)
        assert [tuple(a) for a in whole.of(NAMES[1], unit)] == brute_force(tiny_llama, NAMES[1], unit, 4)


def test_one_row_per_sample(tiny_llama: nn.Module) -> None:
    with MaxActivating(LAYER, k=2, tokens="mean").prepare(tiny_llama) as hooked, torch.no_grad():
        hooked(padded(TEXTS, "left"))
    assert {a.position for a in hooked.hooking_context.samples().of(NAMES[0], 0)} == {-1}


def test_generated_tokens_belong_to_their_prompt(tiny_llama: nn.Module) -> None:
    with MaxActivating(LAYER, k=20, tokens="generated", skip_first=0).prepare(tiny_llama) as hooked:
        hooked.generate(**padded(TEXTS[:2], "left"), max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = hooked.hooking_context.samples().of(NAMES[0], 0)
    assert {(a.sample, a.position) for a in found} == {(0, 4), (0, 5), (0, 6), (1, 2), (1, 3), (1, 4)}


def test_errors(tiny_llama: nn.Module, hooks_of: Any) -> None:
    count = hooks_of(tiny_llama)
    with MaxActivating(LAYER, required=False).prepare(tiny_llama) as hooked, torch.no_grad():
        context = hooked.hooking_context
        with pytest.raises(RuntimeError, match="no row"):
            context.samples()
        context.set_sample_ids(torch.tensor([-1]))
        with pytest.raises(ValueError, match="sample ids"):
            hooked(input_ids=torch.tensor([TEXTS[0]]))
        hooked(input_ids=torch.tensor([TEXTS[0]]))
        samples = context.samples()
    with pytest.raises(ValueError, match="did you mean 'model.layers.1.mlp.act_fn'"):
        samples.of("model.layers.1.mlp.act", 0)
    with pytest.raises(ValueError, match="units 0 to 63, got 64"):
        samples.of(NAMES[0], 64)
    with pytest.raises(ValueError, match="k=0"):
        MaxActivating(LAYER, k=0)
    assert hooks_of(tiny_llama) == count


def test_the_text_around_a_token_of_a_real_model(minilm: tuple[nn.Module, Any]) -> None:
    model, tokenizer = minilm
    texts = ["The cat sat on the mat.", "A dog!", "Nobody came, and nobody left; the house was quiet."]
    layer = "encoder.layer.2.intermediate"
    with MaxActivating(rf"{layer}$", k=1, skip_first=0).prepare(model) as hooked, torch.no_grad():
        for batch in hf.batches(texts, tokenizer, batch_size=2):
            hooked.hooking_context.set_sample_ids(batch.ids)
            hooked(batch.inputs)
    (best,) = hooked.hooking_context.samples().of(layer, 100)
    with torch.no_grad(), ActivationCaching(rf"{layer}$").prepare(model) as hooked:
        alone = tokenizer(texts[best.sample], return_tensors="pt")
        hooked(alone)
    assert hooked.hooking_context.cache[layer][0, best.position, 100].item() == pytest.approx(best.value, abs=1e-4)
    before, token, after = text_around(tokenizer, texts[best.sample], best.position, width=2)
    ids = alone["input_ids"][0, max(0, best.position - 2) : best.position + 3]
    assert " ".join(filter(None, (before, token, after))).split() == tokenizer.decode(ids).split()
    assert token == tokenizer.decode(alone["input_ids"][0, best.position])
    with pytest.raises(ValueError, match="position 99"):
        text_around(tokenizer, texts[0], 99)
