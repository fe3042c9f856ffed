"""Other hooks, early stops and checkpointing on real models: the numbers stay what they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.contexts import HookingContextFactory, Site
from tdprobe.hooks import Hook, MultiHookHandle
from tdprobe.latent import ActivationCaching
from tdprobe.modules import HookedModule

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


# Early stop and transformers' own capture.


def test_a_model_is_exact_after_an_early_stop(smollm2: Any) -> None:
    model, tokenizer = smollm2
    encoding = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        bare = model(**encoding, output_hidden_states=True)
        with ActivationCaching(r"model\.layers\.[0-9]$", early_stop=True).prepare(model) as hooked:
            assert hooked(encoding) is None
            assert hooked(**encoding, output_hidden_states=True) is None
            td = TensorDict(dict(encoding), batch_size=[1])
            assert hooked(td) is td and set(td.keys()) == set(encoding.keys())
            text = hooked.generate(**encoding, max_new_tokens=1, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(text[0, -1]).strip() == "Paris"
        after = model(**encoding, output_hidden_states=True)
        assert len(after.hidden_states) == 31 and model(**encoding).hidden_states is None
    assert torch.equal(after.logits, bare.logits)
    assert all(torch.equal(x, y) for x, y in zip(after.hidden_states, bare.hidden_states, strict=True))
    cache = hooked.hooking_context.cache
    assert set(cache.keys()) == {f"model.layers.{i}" for i in range(10)}


class Scaling(HookingContextFactory):
    """Multiplies the output of one layer."""

    def __init__(self, name: str, scale: float) -> None:
        super().__init__()
        self.name, self.scale = name, scale

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context, site = module.hooking_context, Site(self.name)
        context.sites.append(site)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not context.gate.admits():
                return None
            context.fired(site)
            return output * self.scale

        place = context.model.get_submodule(self.name)
        return MultiHookHandle([Hook(place, "fwd", hook, edits=True, order=context.gate.number)])


def fresh_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("captured", ["before", "inside", "never"])
@pytest.mark.parametrize("first", ["edit", "cache"])
def test_edits_are_seen_by_every_observer_whenever_transformers_installed_its_own(captured: str, first: str) -> None:
    model, ids = fresh_llama(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states if captured == "before" else None
        edit, cache = Scaling("model.layers.1", 3.0).prepare(model), ActivationCaching(LAYERS).prepare(model)
        contexts = (edit, cache) if first == "edit" else (cache, edit)
        with contexts[0], contexts[1] as hooked:
            states = hooked(input_ids=ids, output_hidden_states=captured != "never").hidden_states
        after = model(ids, output_hidden_states=True).hidden_states
        with ActivationCaching(LAYERS).prepare(model) as hooked:
            hooked(input_ids=ids)
        bare = hooked.hooking_context.cache
    assert torch.equal(cache.cache["model.layers.1"], 3 * bare["model.layers.1"])
    assert len(after) == 4 and torch.equal(after[2], bare["model.layers.1"])
    if states is not None:
        assert torch.equal(states[2], cache.cache["model.layers.1"])
    if plain is not None:
        assert all(torch.equal(x, y) for x, y in zip(plain, after, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_llama(reentrant: bool) -> None:
    model, ids = fresh_llama().train(), torch.tensor([[5, 6, 7]])
    plain = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with ActivationCaching(r"model\.layers\.\d\.self_attn$", occurrences="all").prepare(model) as hooked:
            hooked(input_ids=ids, labels=ids).loss.backward()
        context = hooked.hooking_context
        assert set(context.n_fired.values()) == {1} and len(context.n_fired) == 3
        assert all(len(runs) == 1 for runs in context.occurrences.values())
        values = {name: context.cache[name].detach() for name in context.cache.keys()}
        grads = [p.grad for p in model.parameters()]
        if checkpointing:
            torch.testing.assert_close(values, plain["values"])
            torch.testing.assert_close(grads, plain["grads"])
        plain = {"values": values, "grads": [g.clone() for g in grads]}
    model.disable_input_require_grads()


def test_no_trace_is_left_on_model_or_tokenizer(smollm2: Any) -> None:
    model, tokenizer = smollm2
    kinds = [type(part) for part in model.modules()]
    attention = model.config._attn_implementation
    state = torch.get_rng_state()
    pads = tokenizer.padding_side, tokenizer.pad_token
    with torch.no_grad(), ActivationCaching(LAYERS, tokens="last").prepare(model) as hooked:
        hooked(tokenizer(TEXTS[0], return_tensors="pt"))
    assert [type(part) for part in model.modules()] == kinds and not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)
    assert (tokenizer.padding_side, tokenizer.pad_token) == pads


def test_unmasked_padding_is_refused(smollm2: Any) -> None:
    model, tokenizer = smollm2
    with padding(tokenizer, "right") as encode:
        ids = encode(TEXTS)["input_ids"]
    ids[ids == tokenizer.eos_token_id] = model.config.pad_token_id
    with torch.no_grad(), pytest.raises(ValueError, match="pass attention_mask"):
        with ActivationCaching(LAYERS, tokens="last").prepare(model) as hooked:
            hooked(input_ids=ids)
