"""Caching on SmolLM2, MiniLM, a small Llama and a small GPT-2, against the models' own results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.latent import ActivationCaching

TEXTS = ["The capital of France is", "Water", "A bird in the hand is worth two in the bush, they say"]
LAYERS = r"model\.layers\.\d+$"


@contextlib.contextmanager
def padding(tokenizer: Any, side: str) -> Iterator[Callable[[list[str]], Any]]:
    """Give an encoder that pads on one side, and leave the tokenizer as it was."""
    before = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = side
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    yield lambda texts: tokenizer(texts, return_tensors="pt", padding=True)
    tokenizer.padding_side, tokenizer.pad_token = before


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_of_a_padded_batch_is_that_of_each_prompt_alone(smollm2: Any, side: str) -> None:
    model, tokenizer = smollm2
    with torch.inference_mode(), padding(tokenizer, side) as encode:
        with ActivationCaching(LAYERS, tokens="last").prepare(model) as hooked:
            hooked(encode(TEXTS))
        rows = hooked.hooking_context.cache
        assert len(rows.keys()) == 30
        for i, text in enumerate(TEXTS):
            with ActivationCaching(LAYERS).prepare(model) as hooked:
                hooked(tokenizer(text, return_tensors="pt"))
            alone = hooked.hooking_context.cache
            worst = max(relative_error(rows[name][i], alone[name][0, -1]) for name in rows.keys())
            assert worst < 1e-4, text


def test_generated_tokens_of_a_padded_batch_are_those_of_each_prompt_alone(smollm2: Any) -> None:
    model, tokenizer = smollm2
    factory = ActivationCaching(r"model\.layers\.(3|20)$", tokens="generated", occurrences="all")
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id,
    }
    with torch.inference_mode(), padding(tokenizer, "left") as encode:
        with factory.prepare(model) as hooked:
            together = hooked.generate(**encode(TEXTS[:2]), **options)
        batch = hooked.hooking_context
        for i, text in enumerate(TEXTS[:2]):
            with factory.prepare(model) as hooked:
                alone = hooked.generate(**tokenizer(text, return_tensors="pt"), **options)
            assert torch.equal(alone[0, -4:], together[i, -4:])
            for key, steps in batch.occurrences.items():
                # The last of four new tokens is never fed back.
                wanted = hooked.hooking_context.stacked(key)
                assert len(steps) == 3 and batch.phases[key] == ["generated"] * 3
                assert relative_error(torch.stack(steps)[:, i], wanted[:, 0]) < 1e-4
    assert "Paris" in tokenizer.decode(together[0])


def test_generate_gives_the_prompt_first_and_then_one_step_at_a_time(tiny_llama: nn.Module) -> None:
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    bare = tiny_llama.generate(input_ids=ids, attention_mask=mask, **options)
    with ActivationCaching(r"model\.layers\.2$", occurrences="all").prepare(tiny_llama) as hooked:
        inside = hooked.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(inside, bare)
    context = hooked.hooking_context
    key = "model.layers.2"
    assert [tuple(v.shape) for v in context.occurrences[key]] == [
        (2, 4, 32),
        (2, 1, 32),
        (2, 1, 32),
        (2, 1, 32),
    ]
    assert context.phases[key] == ["prompt", "generated", "generated", "generated"]
    # Row 1 has no pads: its steps are the positions of one pass over the whole text.
    with torch.no_grad(), ActivationCaching(r"model\.layers\.2$").prepare(tiny_llama) as hooked:
        hooked(input_ids=inside[1:, :-1])
    steps = torch.cat([v[1] for v in context.occurrences[key]])
    torch.testing.assert_close(steps, hooked.hooking_context.cache[key][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "phases", "rows"),
    [
        ("last", ["prompt"], [2]),
        ("all", ["prompt", "generated", "generated"], [6, 2, 2]),
        ("generated", ["generated", "generated"], [2, 2]),
        (3, ["prompt", "generated"], [1, 1]),
        (5, ["generated"], [1]),
    ],
)
def test_a_step_without_a_chosen_token_changes_nothing(
    tiny_llama: nn.Module, tokens: Any, phases: list[str], rows: list[int]
) -> None:
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with ActivationCaching(r"model\.layers\.2$", tokens=tokens, occurrences="all").prepare(tiny_llama) as hooked:
        hooked.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
    context = hooked.hooking_context
    assert context.phases["model.layers.2"] == phases
    assert [len(v) for v in context.occurrences["model.layers.2"]] == rows
    assert torch.equal(context.cache["model.layers.2"], context.occurrences["model.layers.2"][-1])


def test_a_position_that_generation_never_reaches_is_an_error(tiny_llama: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="or no token of their calls matched tokens=50"):
        with ActivationCaching(r"model\.layers\.2$", tokens=50).prepare(tiny_llama) as hooked:
            hooked.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_beams_are_rows_of_the_batch(tiny_llama: nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {
        "num_beams": 3,
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    bare = tiny_llama.generate(input_ids=ids, **options)
    factory = ActivationCaching(r"model\.layers\.0$", occurrences="all", tokens="all")
    with factory.prepare(tiny_llama) as hooked:
        assert torch.equal(hooked.generate(input_ids=ids, **options), bare)
    runs = hooked.hooking_context.occurrences["model.layers.0"]
    assert [tuple(v.shape) for v in runs] == [(2 * 3 * 3, 32), (6, 32), (6, 32)]
    assert torch.equal(runs[0][:9], runs[0][:3].repeat(3, 1))


# Ways in.


def test_every_way_to_call_smollm2_gives_the_same_bits(smollm2: Any) -> None:
    model, tokenizer = smollm2
    encoding = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        bare = model(**encoding)
        for call in (lambda h: h(encoding), lambda h: h(**encoding), lambda h: model(**encoding)):
            with ActivationCaching(LAYERS).prepare(model) as hooked:
                result = call(hooked)
            assert type(result) is type(bare) and torch.equal(result.logits, bare.logits)
        td = TensorDict(dict(encoding), batch_size=[1])
        with ActivationCaching(LAYERS).prepare(model) as hooked:
            assert hooked(td) is td
        assert torch.equal(td["output"], bare.logits)


def test_a_list_of_in_keys_is_bound_by_name(smollm2: Any) -> None:
    model, tokenizer = smollm2
    with torch.no_grad(), padding(tokenizer, "left") as encode:
        encoding = encode(TEXTS[:2])
        bare = model(**encoding).logits
        td = TensorDict(dict(encoding), batch_size=[2])
        # By position, the third would land in position_ids or the cache.
        with ActivationCaching(LAYERS).prepare(model, ["attention_mask", "input_ids"]) as hooked:
            assert torch.equal(hooked(td)["output"], bare)


@pytest.mark.parametrize("side", ["left", "right"])
def test_minilm_with_pads_gives_the_mean_that_sentence_embedding_uses(minilm: Any, side: str) -> None:
    model, tokenizer = minilm
    with torch.no_grad(), padding(tokenizer, side) as encode:
        encoding = encode(TEXTS)
        with ActivationCaching(r"encoder\.layer\.\d$", tokens="mean").prepare(model) as hooked:
            hidden = hooked(**encoding).last_hidden_state
    mask = encoding["attention_mask"].unsqueeze(-1)
    rows = hooked.hooking_context.cache["encoder.layer.5"]
    torch.testing.assert_close(rows, (hidden * mask).sum(1) / mask.sum(1), rtol=1e-5, atol=1e-6)
    assert len(hooked.hooking_context.cache.keys()) == 6


@pytest.mark.parametrize("pattern", [r"model\.layers\.\d\.self_attn$", r"model\.layers\.\d+\.mlp"])
@pytest.mark.parametrize("direction", ["fwd", "fwd_pre"])
def test_tuples_and_keyword_calls_are_cached_without_changing_the_model(
    tiny_llama: nn.Module, pattern: str, direction: Any
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    expected: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            expected[name] = (
                inputs if direction == "fwd_pre" else output[0] if isinstance(output, tuple) else output
            ).clone()

        return hook

    with torch.no_grad():
        bare = tiny_llama(ids).logits
        with ActivationCaching(pattern, directions=[direction]).prepare(tiny_llama) as hooked:
            names = hooked.hooking_context.n_fired
            users = [tiny_llama.get_submodule(n).register_forward_hook(look(n), with_kwargs=True) for n in names]
            assert torch.equal(hooked(input_ids=ids).logits, bare)
    for user in users:
        user.remove()
    cache = hooked.hooking_context.cache
    assert set(cache.keys()) == set(expected) and all(torch.equal(cache[n], expected[n]) for n in expected)
