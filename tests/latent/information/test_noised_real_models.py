"""Noise at modules of a small Llama, MiniLM and SmolLM2."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tdprobe import LayerScoring
from tdprobe.latent import ActivationCaching, NoisedInformation, NoisedInformationEstimator

IDS = torch.tensor([[5, 3, 9, 17, 2, 8], [1, 2, 3, 4, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
RIGHT = {"input_ids": IDS, "attention_mask": MASK}
LEFT = {"input_ids": IDS.clone(), "attention_mask": MASK.clone()}
for rows in LEFT.values():
    rows[1] = rows[1].roll(2)
LAYERS = r"model\.layers\.\d+$"


def noised(factory: NoisedInformation, model: Any, *calls: Any) -> Any:
    with torch.no_grad(), factory.prepare(model) as hooked:
        with hooked.calibrating():
            hooked(**RIGHT)
        outputs = [hooked(**call) for call in calls]
    return hooked.hooking_context, outputs


@pytest.mark.parametrize("pattern", [LAYERS, r"model\.layers\.2\.self_attn$", r"model\.layers\.1\.mlp$", r"lm_head$"])
def test_any_module_of_a_llama_takes_noise_whichever_side_is_padded(tiny_llama: Any, pattern: str):
    factory = NoisedInformation(pattern, noise=0.3, max_norm=None)
    context, (right,) = noised(factory, tiny_llama, RIGHT)
    _, (left,) = noised(factory, tiny_llama, LEFT)
    plain = tiny_llama(**RIGHT).logits
    torch.testing.assert_close(
        left.logits[LEFT["attention_mask"].bool()], right.logits[MASK.bool()], atol=1e-5, rtol=1e-5
    )
    changed = (right.logits != plain).any(-1)
    assert torch.equal(changed[:, 1:] & MASK[:, 1:].bool(), MASK[:, 1:].bool()) and not changed[:, 0].any()
    table = context.scores()
    lower, upper = (table.matrix(name) for name in ("information_lower", "information_upper"))
    assert (lower > 0).all() and (lower <= upper).all() and (upper <= math.log(8) + 1e-9).all()
    assert type(right) is type(tiny_llama(**RIGHT))


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}])
def test_generation_without_noise_is_bit_identical_and_with_it_reproducible(tiny_llama: Any, options: Any):
    prompt = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    run = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0, **options}
    stds = noised(NoisedInformation(LAYERS), tiny_llama)[0].stds

    def generated(factory: NoisedInformation | None) -> Tensor:
        torch.manual_seed(0)
        if factory is None:
            return torch.stack(tiny_llama.generate(**prompt, **run).logits)
        with factory.prepare(tiny_llama) as hooked:
            return torch.stack(hooked.generate(**prompt, **run).logits)

    plain = generated(None)
    assert torch.equal(generated(NoisedInformation(LAYERS, noise=0)), plain)
    factory = NoisedInformation(LAYERS, noise=0.5, stds=stds)
    assert torch.equal(generated(factory), generated(factory)) and not torch.equal(generated(factory), plain)
    # Only what is generated: the first logits come from the prompt.
    late = generated(NoisedInformation(LAYERS, noise=0.5, stds=stds, tokens="generated"))
    assert torch.equal(late[0], plain[0]) and not torch.equal(late[-1], plain[-1])


def test_captures_see_the_noise_whenever_they_were_installed(tiny_llama: Any):
    stds = noised(NoisedInformation(LAYERS), tiny_llama)[0].stds
    factory, states = NoisedInformation(LAYERS, noise=0.5, stds=stds), []
    for model in (copy.deepcopy(tiny_llama), tiny_llama):
        tiny_llama(**RIGHT, output_hidden_states=True)
        with torch.no_grad(), factory.prepare(model) as hooked, ActivationCaching(LAYERS).prepare(model) as watched:
            states.append(hooked(**RIGHT, output_hidden_states=True).hidden_states)
        assert torch.equal(watched.hooking_context.cache["model.layers.1"], states[-1][2])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert len(tiny_llama(**RIGHT, output_hidden_states=True).hidden_states) == 5


def test_training_under_gradient_checkpointing_repeats_the_noise(tiny_llama: Any):
    stds = noised(NoisedInformation(LAYERS), tiny_llama)[0].stds
    factory, grads = NoisedInformation(LAYERS, noise=0.5, stds=stds), []
    for checkpointed in (False, True):
        model = copy.deepcopy(tiny_llama).train()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with factory.prepare(model) as hooked:
            for _ in range(2):
                hooked(**RIGHT, labels=IDS).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads)


def test_half_a_model_in_bfloat16(tiny_llama: Any):
    model = copy.deepcopy(tiny_llama).bfloat16()
    context, (out,) = noised(NoisedInformation(LAYERS, noise=0.3), model, RIGHT)
    assert out.logits.dtype == torch.bfloat16 and len(context.scores()) == 8


@torch.no_grad()
def test_more_noise_tells_less_at_the_front_of_minilm(minilm: Any):
    model, tokenizer = minilm
    texts = ["What a great and happy day", "The food was awful and the staff were rude", "A dull film", "It rains"]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
    plain, found = model(**inputs).last_hidden_state, []
    for noise in (0.25, 4.0, 16.0):
        with NoisedInformation("embeddings$", noise=noise).prepare(model) as hooked:
            with hooked.calibrating():
                assert torch.equal(hooked(**inputs).last_hidden_state, plain)
            out = hooked(**inputs).last_hidden_state
        table = hooked.scores()
        moved = (out - plain)[inputs["attention_mask"].bool()].norm() / plain.norm()
        found.append([*(row.score for row in table.rows()), moved.item()])
    low, high, moved = zip(*found, strict=True)
    limit = table.meta["log_rows"]
    assert low[0] > 0.9 * limit and high[2] < 0.7 * limit
    assert low[0] > low[1] > low[2] and high[0] > high[1] > high[2] and 0 < moved[0] < moved[1]


def test_layers_of_smollm2_without_touching_it(smollm2: Any):
    model, tokenizer = smollm2
    inputs = dict(tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt"))
    bounds = [NoisedInformationEstimator(noise=4.0, bound=bound) for bound in ("lower", "upper")]
    scoring = LayerScoring(r"model\.(embed_tokens|layers\.(4|14|29))$", bounds, skip_first=0, max_norm=None)
    with torch.no_grad(), scoring.prepare(model) as hooked:
        hooked(**inputs)
    low, high = (block.values for block in hooked.scores().blocks)
    ids = inputs["input_ids"][0]
    _, counts = ids.unique(return_counts=True)
    share = counts / len(ids)
    # The embedding knows which word it is and nothing of its place; a layer knows both.
    assert high[0] <= -(share * share.log()).sum().item() + 1e-6 < math.log(len(ids)) < high[2] + 0.2
    assert (low <= high).all() and (low[1:] > 0).all()
