"""Patching, steering and addition on SmolLM2, MiniLM and a small Llama."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.latent import ActivationAddition, ActivationCaching, ActivationPatching, SteeringVectors

CLEAN, OTHER = "The capital of France is", "The capital of Italy is"
IDS = torch.tensor([[5, 3, 9, 17, 2, 8], [1, 2, 3, 4, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LEFT_IDS, LEFT_MASK = IDS.clone(), MASK.clone()
LEFT_IDS[1], LEFT_MASK[1] = IDS[1].roll(2), MASK[1].roll(2)
RIGHT = {"input_ids": IDS, "attention_mask": MASK}
LEFT = {"input_ids": LEFT_IDS, "attention_mask": LEFT_MASK}


def encode(tokenizer: Any, *texts: str) -> Any:
    return tokenizer(list(texts), return_tensors="pt", padding=len(texts) > 1)


@pytest.fixture(scope="module")
def capitals(smollm2: Any) -> Any:
    model, tokenizer = smollm2
    clean, other = encode(tokenizer, CLEAN), encode(tokenizer, OTHER)
    assert clean["input_ids"].shape == other["input_ids"].shape
    paris, rome = (tokenizer(city)["input_ids"] for city in (" Paris", " Rome"))
    assert len(paris) == len(rome) == 1

    def difference(output: Any) -> Tensor:
        return output.logits[:, -1, paris[0]] - output.logits[:, -1, rome[0]]

    with torch.no_grad():
        ends = [difference(model(**inputs)).item() for inputs in (clean, other)]
    # The model knows both capitals, or there would be nothing to recover.
    assert ends[0] > 3 and ends[1] < -3
    return clean, other, difference, *ends


def test_the_best_site_recovers_the_logit_difference(smollm2: Any, capitals: Any) -> None:
    model, tokenizer = smollm2
    clean, other, difference, high, low = capitals
    with ActivationPatching(["model.layers[:]"]).prepare(model) as hooked:
        found = hooked.sweep(clean, other, difference)[:, 0]
    assert set(hooked.hooking_context.n_fired) == {f"model.layers[{i}]" for i in range(30)}
    recovered = (found - low) / (high - low)
    assert recovered.shape == (30, 5) and recovered.max() >= 0.9
    country = tokenizer.tokenize(OTHER).index("ĠItaly")
    # Tokens before the country are the same in both prompts, and causal attention lets nothing into them.
    torch.testing.assert_close(recovered[:, :country], torch.zeros(30, country), atol=1e-4, rtol=0)
    # All that the first layer knows of the country is at the country; all that is read off the last is at the end.
    assert recovered[0].argmax() == country and recovered[0, country] > 0.99
    assert recovered[-1].argmax() == 4 and recovered[-1, 4] == pytest.approx(1, abs=1e-4)


def test_a_sweep_gives_what_single_patches_give(smollm2: Any, capitals: Any) -> None:
    model, _ = smollm2
    clean, other, difference, *_ = capitals
    paths = ["model.layers[4]", "model.layers[22]"]
    with torch.no_grad(), ActivationPatching(paths).prepare(model) as hooked:
        found = hooked.sweep(clean, other, difference, rows_per_call=3)[:, 0]
    for row, path in enumerate(paths):
        for position in (3, 4):
            with torch.no_grad(), ActivationPatching([path], tokens=position).prepare(model) as hooked:
                single = difference(hooked.patch(clean, other))
            torch.testing.assert_close(single[0], found[row, position], atol=2e-4, rtol=1e-4)


def test_patch_needs_the_clean_run_up_to_its_module_only(smollm2: Any, capitals: Any) -> None:
    model, ran = smollm2[0], []
    clean, other, difference, high, _ = capitals
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.model.layers)]
    try:
        with torch.no_grad(), ActivationPatching(["model.layers[10]"]).prepare(model) as hooked:
            output = hooked.patch(clean, other)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [*range(10), *range(30)] or ran == [*range(11), *range(30)]
    # The whole of a layer's output decides everything after it.
    assert difference(output).item() == pytest.approx(high, abs=1e-4)


def test_the_documented_form_takes_both_encodings_in_one_tensordict(smollm2: Any, capitals: Any) -> None:
    model, _ = smollm2
    clean, other, *_ = capitals
    td = TensorDict({**clean, "patched": {**other}}, batch_size=[1])
    with torch.no_grad():
        with ActivationPatching(["model.layers[29]"]).prepare(
            model, ["input_ids", "attention_mask"], ["logits"]
        ) as hooked:
            result = hooked(td)
        expected = model(**clean).logits
    torch.testing.assert_close(result["logits"], expected)
    torch.testing.assert_close(result["patched", "logits"], expected)
    with torch.no_grad(), ActivationPatching(["model.layers[29]"], tokens="last").prepare(model) as hooked:
        result = hooked(TensorDict({**clean, "patched": {**other}}, batch_size=[1]))
        alone = model(**other).logits
    torch.testing.assert_close(result["patched", "output"][:, -1], expected[:, -1])
    assert torch.equal(result["patched", "output"][:, :-1], alone[:, :-1])


def test_a_patched_prompt_goes_on_as_the_clean_one(smollm2: Any, capitals: Any) -> None:
    model, tokenizer = smollm2
    clean, other, *_ = capitals
    with torch.no_grad(), ActivationPatching(["model.layers[5]"], tokens="all").prepare(model) as hooked:
        with hooked.patching(clean):
            steps = hooked.generate(**other, max_new_tokens=2, do_sample=False)
        plain = model.generate(**other, max_new_tokens=2, do_sample=False)
    ends = [tokenizer.decode(ids[0, 5:]) for ids in (steps, plain)]
    assert ends[0].startswith(" Paris") and ends[1].startswith(" Rome")


# Steering.

CONTRAST = [
    ("I love this, it is wonderful", "I hate this, it is terrible"),
    ("What a great and happy day", "What an awful and sad day"),
    ("The food was delicious and the staff were kind", "The food was disgusting and the staff were rude"),
    ("A brilliant, moving film", "A boring, stupid film"),
    ("Everyone was delighted with the result", "Everyone was angry about the result"),
]


@pytest.fixture(scope="module")
def direction(smollm2: Any) -> Tensor:
    model, tokenizer = smollm2
    padding = tokenizer.pad_token, tokenizer.padding_side
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    positive, negative = (encode(tokenizer, *texts) for texts in zip(*CONTRAST, strict=True))
    tokenizer.pad_token, tokenizer.padding_side = padding
    factory = ActivationAddition(["model.layers[14]"], tokens="mean", skip_first=1, early_stop=True)
    with torch.no_grad(), factory.prepare(model) as hooked:
        return hooked.contrast(positive, negative)["steer", "model.layers[14]"]


def test_the_contrast_is_the_difference_of_means_over_real_tokens(smollm2: Any, direction: Tensor) -> None:
    model, tokenizer = smollm2
    means = []
    for side in zip(*CONTRAST, strict=True):
        rows = []
        for text in side:
            with torch.no_grad(), ActivationCaching(r"model\.layers\.14$").prepare(model) as hooked:
                hooked(**encode(tokenizer, text))
            rows.append(hooked.hooking_context.cache["model.layers.14"][0, 1:].mean(0))
        means.append(torch.stack(rows).mean(0))
    torch.testing.assert_close(direction, means[0] - means[1], atol=1e-4, rtol=1e-4)


def test_steering_changes_what_the_model_likes_to_say(smollm2: Any, direction: Tensor) -> None:
    model, tokenizer = smollm2
    prompt = encode(tokenizer, "I think the movie was")
    good = [tokenizer(word)["input_ids"][0] for word in (" great", " good", " amazing", " wonderful")]
    bad = [tokenizer(word)["input_ids"][0] for word in (" bad", " terrible", " awful", " boring")]

    def liking(scale: float) -> float:
        factory = SteeringVectors(["model.layers[14]"], vector=direction, scale=scale)
        with torch.no_grad(), factory.prepare(model) as hooked:
            chances = hooked(**prompt).logits[0, -1].log_softmax(-1)
        return (chances[good].logsumexp(0) - chances[bad].logsumexp(0)).item()

    values = [liking(scale) for scale in (-2.0, 0.0, 2.0)]
    assert values[0] < values[1] < values[2] and values[2] - values[0] > 2


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_zero_times_the_vector_generates_the_same_and_one_times_does_not(
    smollm2: Any, direction: Tensor, options: Any
) -> None:
    model, tokenizer = smollm2
    prompt = encode(tokenizer, "I think the movie was")

    def texts(scale: float | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        run = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, **options}
        if scale is None:
            found = model.generate(**prompt, **run)
        else:
            with SteeringVectors(["model.layers[14]"], vector=direction, scale=scale).prepare(model) as hooked:
                found = hooked.generate(**prompt, **run)
        return found.sequences, torch.stack(found.logits)

    plain, zero, steered = texts(None), texts(0.0), texts(-4.0)
    assert torch.equal(plain[0], zero[0])
    assert torch.equal(plain[1].view(torch.int32), zero[1].view(torch.int32))
    assert not torch.equal(plain[1], steered[1][: len(plain[1])])


def test_all_layers_can_be_steered_by_one_contrast(smollm2: Any) -> None:
    model, tokenizer = smollm2
    paths = [f"model.layers[{i}]" for i in (3, 20)]
    factory = ActivationAddition(paths, tokens="last")
    with torch.no_grad():
        with factory.prepare(model) as hooked:
            steer = hooked.contrast(encode(tokenizer, CLEAN), encode(tokenizer, OTHER))["steer"]
        with SteeringVectors(paths, vector=steer, tokens="last").prepare(model) as hooked:
            found = hooked(**encode(tokenizer, OTHER))
    assert found.logits.isfinite().all() and set(steer.keys()) == set(paths)


# A small Llama, whose every pass can be compared with plain hooks.


def plain(model: nn.Module, place: str, edit: Any, inputs: Any) -> Tensor:
    """Run with an ordinary torch hook, as the reference."""
    handle = model.get_submodule(place).register_forward_hook(lambda module, args, output: edit(output))
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("inputs", [RIGHT, LEFT])
@pytest.mark.parametrize("place", ["model.layers.2", "model.layers.1.mlp", "model.layers.1.self_attn"])
def test_patches_are_those_of_plain_hooks(tiny_llama: nn.Module, place: str, inputs: Any) -> None:
    seen: list[Any] = []
    other = inputs | {"input_ids": inputs["input_ids"].flip(0) * inputs["attention_mask"]}
    plain(tiny_llama, place, lambda output: seen.append(output), inputs)
    value = seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def edit(output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = first.clone()
        for row, keep in enumerate(inputs["attention_mask"].bool()):
            new[row, keep.nonzero()[-1]] = value[row, keep.nonzero()[-1]]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    expected = plain(tiny_llama, place, edit, other)
    with torch.no_grad(), ActivationPatching([place], tokens="last").prepare(tiny_llama) as hooked:
        assert torch.equal(hooked.patch(inputs, other).logits, expected)


def test_prompts_padded_on_different_sides_patch_the_same_tokens(tiny_llama: nn.Module) -> None:
    clean = {side: given | {"input_ids": (given["input_ids"] * 7) % 100} for side, given in (("l", LEFT), ("r", RIGHT))}
    with torch.no_grad(), ActivationPatching(["model.layers[1]"], tokens=[1, -1]).prepare(tiny_llama) as hooked:
        outs = [hooked.patch(clean[side], RIGHT).logits for side in "lr"]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [("prompt", [0]), ("generated", [1, 2, 3]), ("all", [0, 1, 2, 3]), (None, [0, 1, 2, 3]), ("last", [0]), (7, [2])],
)
@pytest.mark.parametrize("beams", [1, 2])
def test_tokens_in_generate_are_absolute(tiny_llama: nn.Module, tokens: Any, steps: list[int], beams: int) -> None:
    edited = []

    def steer(module_key: str, output: Tensor) -> Tensor:
        edited.append(output.shape[0] if tokens is not None else -1)
        return output + 0.5

    passes: list[tuple[int, ...]] = []
    observer = ActivationCaching(r"model\.layers\.1$", occurrences="all")
    with torch.no_grad(), SteeringVectors(["model.layers[1]"], steer, tokens=tokens).prepare(tiny_llama) as hooked:
        with observer.prepare(tiny_llama) as seen:
            hooked.generate(
                **LEFT, max_new_tokens=4, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        passes = [tuple(value.shape) for value in seen.hooking_context.occurrences["model.layers.1"]]
    assert [shape[1] for shape in passes] == [6, 1, 1, 1]
    # Position 7 is decoding step 2 in the row of six tokens; the row of four has it two steps later, which is not run.
    assert len(edited) == len(steps) == hooked.hooking_context.n_fired["model.layers[1]"]
    rows = {"prompt": 10, "last": 2, "generated": 2, 7: 1}.get(tokens)
    if rows is not None:
        assert edited[0] in (rows, rows * beams)


def test_steered_states_are_seen_by_transformers_capture_in_any_order(tiny_llama: nn.Module) -> None:
    def steered_state(model: nn.Module, capture_first: bool) -> Tensor:
        with torch.no_grad():
            if capture_first:
                model(**RIGHT, output_hidden_states=True)
            with SteeringVectors(["model.layers[1]"], vector=torch.ones(32)).prepare(model) as hooked:
                states = hooked(**RIGHT, output_hidden_states=True).hidden_states
            after = model(**RIGHT, output_hidden_states=True).hidden_states
            assert len(states) == len(after) == 5
            assert not torch.equal(after[2], states[2])
            return states[2]

    found = [steered_state(copy.deepcopy(tiny_llama), first) for first in (True, False)]
    assert torch.equal(*found)
    # The entry after layer 1 is its output, with the vector in it.
    seen: list[Tensor] = []
    plain(tiny_llama, "model.layers.1", lambda output: seen.append(output), RIGHT)
    torch.testing.assert_close(found[0], seen[0] + 1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(tiny_llama: nn.Module, reentrant: bool) -> None:
    model = copy.deepcopy(tiny_llama).train()

    def gradients(checkpointing: bool) -> list[Tensor]:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        factory = SteeringVectors(
            ["model.layers[1]", "model.layers[2].self_attn"], vector=torch.ones(32), tokens="last"
        )
        with factory.prepare(model) as hooked:
            hooked(**RIGHT, labels=IDS).loss.backward()
        assert set(hooked.hooking_context.n_fired.values()) == {1}
        return [parameter.grad.clone() for parameter in model.parameters()]

    for bare, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, bare, atol=1e-6, rtol=1e-4)


def test_patching_under_gradient_checkpointing_of_transformers(tiny_llama: nn.Module) -> None:
    model = copy.deepcopy(tiny_llama).train()
    clean = RIGHT | {"input_ids": (IDS * 7) % 100}

    def gradients(checkpointing: bool) -> list[Tensor]:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with ActivationPatching(["model.layers[1].mlp", "model.layers[2]"], tokens="last").prepare(model) as hooked:
            hooked.patch(clean, RIGHT | {"labels": IDS}).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for bare, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, bare, atol=1e-6, rtol=1e-4)


def states_of(model: nn.Module, inputs: Any) -> Tensor:
    with ActivationCaching(r"encoder\.layer\.2$").prepare(model) as seen:
        seen(**inputs)
    return seen.hooking_context.cache["encoder.layer.2"]


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_an_encoder_is_steered_on_real_tokens(minilm: Any, tokens: str) -> None:
    model, tokenizer = minilm
    inputs = encode(tokenizer, "A very bad film indeed", "No")
    with torch.no_grad():
        with SteeringVectors(["encoder.layer[2]"], vector=torch.ones(384), tokens=tokens).prepare(model):
            steered = states_of(model, inputs)
        moved = (steered - states_of(model, inputs)).abs().amax(-1) > 0.5
    mask = inputs["attention_mask"].bool()
    assert torch.equal(moved, mask if tokens == "all" else mask & (mask.cumsum(1) == mask.sum(1, keepdim=True)))


def test_an_encoder_is_patched_on_real_tokens(minilm: Any) -> None:
    model, tokenizer = minilm
    clean, other = (encode(tokenizer, *texts) for texts in (("A good film", "Yes"), ("A very bad film indeed", "No")))
    with torch.no_grad():
        with ActivationPatching(["encoder.layer[5]"], tokens="last").prepare(model) as hooked:
            found = hooked.patch(clean, other).last_hidden_state
        ends = [inputs["attention_mask"].sum(1) - 1 for inputs in (clean, other)]
        expected, alone = model(**clean).last_hidden_state, model(**other).last_hidden_state
        for row in (0, 1):
            assert torch.equal(found[row, ends[1][row]], expected[row, ends[0][row]])
            assert torch.equal(found[row, : ends[1][row]], alone[row, : ends[1][row]])
        with ActivationPatching(["encoder.layer[5]"], tokens="all", required=False).prepare(model) as hooked:
            with pytest.raises(ValueError, match="selects 5 tokens of row 0 of the clean input and 7 of the other"):
                hooked.patch(clean, other)
