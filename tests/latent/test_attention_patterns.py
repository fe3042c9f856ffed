from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tdprobe.latent import AttentionPatterns

IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
MASK = (IDS != 0).long()
NAME = r"model\.layers\.2\.self_attn$"


def implementations(model: nn.Module) -> set[str]:
    return {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}


def test_rows_sum_to_one_and_look_back_only(tiny_llama: nn.Module) -> None:
    with AttentionPatterns().prepare(tiny_llama) as hooked, torch.no_grad():
        hooked(input_ids=IDS, attention_mask=MASK)
    cache = hooked.hooking_context.cache
    assert set(cache.keys()) == {f"model.layers.{layer}.self_attn" for layer in range(4)}
    for weights in cache.values():
        assert weights.shape == (2, 4, 5, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
        assert bool((weights[0].triu(1) == 0).all())
        # Padding on the left is never looked at by real tokens.
        assert bool((weights[1, :, 2:, :2] == 0).all())


def test_weights_follow_the_formula(tiny_llama: nn.Module) -> None:
    seen: dict[str, torch.Tensor] = {}
    layer = tiny_llama.model.layers[0].self_attn
    handles = [
        part.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, part in (("q", layer.q_proj), ("k", layer.k_proj))
    ]
    try:
        with AttentionPatterns(r"model\.layers\.0\.self_attn$").prepare(tiny_llama) as hooked, torch.no_grad():
            hooked(input_ids=IDS[:1])
    finally:
        for handle in handles:
            handle.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = seen["q"].view(1, 5, 4, 8).transpose(1, 2), seen["k"].view(1, 5, 2, 8).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *tiny_llama.model.rotary_emb(q, torch.arange(5)[None]))
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    expected = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(hooked.hooking_context.cache["model.layers.0.self_attn"], expected)


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_the_implementation_is_restored_on_every_way_out(tiny_llama: nn.Module, hooks_of: Any, error: Any) -> None:
    before, output, count = implementations(tiny_llama), tiny_llama(input_ids=IDS).logits, hooks_of(tiny_llama)
    assert before == {"sdpa"}
    try:
        with AttentionPatterns().prepare(tiny_llama) as hooked:
            hooked(input_ids=IDS)
            assert implementations(tiny_llama) == {"eager"}
            if error is not None:
                raise error
    except (ZeroDivisionError, KeyboardInterrupt):
        pass
    assert implementations(tiny_llama) == before and hooks_of(tiny_llama) == count
    assert torch.equal(tiny_llama(input_ids=IDS).logits, output)


def test_a_copy_made_in_the_block_and_lifted_hooks_are_not_switched(new_llama: nn.Module, tmp_path: Any) -> None:
    model = new_llama
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with AttentionPatterns().prepare(model) as hooked:
            eager = hooked(input_ids=IDS).logits
            torch.save(model, tmp_path / "model.pt")
            twins = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
            with hooked.disable_context_hooks():
                assert torch.equal(model(input_ids=IDS).logits, expected)
            assert torch.equal(hooked(input_ids=IDS).logits, eager) and not torch.equal(eager, expected)
        for twin in twins:
            assert implementations(twin) == {"sdpa"} and torch.equal(twin(input_ids=IDS).logits, expected)


def test_a_model_that_gets_another_configuration_in_the_block_is_left_with_it(tiny_llama: nn.Module) -> None:
    model = copy.deepcopy(tiny_llama)
    before, model_config = model.config, copy.deepcopy(model.config)
    with AttentionPatterns().prepare(model) as hooked, torch.no_grad():
        hooked(input_ids=IDS)
        model.config = model_config
    assert model.config is model_config and before._attn_implementation == "sdpa"


def test_a_failed_enter_restores_it(tiny_llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="matches no module"), AttentionPatterns("nowhere").prepare(tiny_llama):
        pass
    context = AttentionPatterns().prepare(tiny_llama)
    with context as hooked:
        with pytest.raises(RuntimeError, match="twice"):
            context.__enter__()
        assert implementations(tiny_llama) == {"eager"}
        hooked(input_ids=IDS)
    assert implementations(tiny_llama) == {"sdpa"}


def test_contexts_may_end_in_any_order(tiny_llama: nn.Module) -> None:
    first, second = (AttentionPatterns(NAME).prepare(tiny_llama, return_context=False) for _ in range(2))
    first(input_ids=IDS)
    first.restore()
    assert implementations(tiny_llama) == {"eager"}
    second(input_ids=IDS)
    second.restore()
    assert implementations(tiny_llama) == {"sdpa"}


def test_a_model_that_was_eager_before_stays_eager(tiny_llama: nn.Module) -> None:
    tiny_llama.set_attn_implementation("eager")
    try:
        with AttentionPatterns(NAME).prepare(tiny_llama) as hooked:
            hooked(input_ids=IDS)
        assert implementations(tiny_llama) == {"eager"}
    finally:
        tiny_llama.set_attn_implementation("sdpa")


def test_an_encoder_looks_both_ways(minilm: tuple[nn.Module, Any]) -> None:
    model, tokenizer = minilm
    encoding = tokenizer(["a cat", "a cat on a mat"], padding=True, return_tensors="pt")
    with AttentionPatterns(early_stop=True).prepare(model) as hooked, torch.no_grad():
        assert hooked(encoding) is None
    cache = hooked.hooking_context.cache
    assert len(cache.keys()) == 6
    for weights in cache.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        # The shorter text is padded on the right: no token looks at the pads.
        assert bool((weights[0, :, :, 4:] < 1e-6).all()) and bool((weights[1].triu(1) > 0).any())
    assert implementations(model) == {"sdpa"}


def test_modules_without_weights_are_named(tiny_llama: nn.Module, hooks_of: Any) -> None:
    count = hooks_of(tiny_llama)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp' \(LlamaMLP\) gives no attention weights"):
        with AttentionPatterns(r"model\.layers\.\d+\.mlp$").prepare(tiny_llama) as hooked:
            hooked(input_ids=IDS)
    assert hooks_of(tiny_llama) == count and implementations(tiny_llama) == {"sdpa"}


class Torch(nn.Module):
    """The attention of torch itself, which has no configuration to switch."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True, dropout=dropout)
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, **self.options)[0]


def test_attention_of_torch() -> None:
    model, x = Torch(average_attn_weights=False), torch.randn(3, 5, 4)
    with AttentionPatterns().prepare(model) as hooked:
        hooked(x)
    expected = model.attn(x, x, x, average_attn_weights=False)[1]
    assert torch.equal(hooked.hooking_context.cache["attn"], expected)
    with (
        pytest.raises(ValueError, match="need_weights"),
        AttentionPatterns().prepare(Torch(need_weights=False)) as hooked,
    ):
        hooked(x)


def test_weights_under_dropout_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="instead of 1.*train mode.*eval"):
        with AttentionPatterns().prepare(Torch(dropout=0.5).train()) as hooked:
            hooked(torch.randn(3, 5, 4))
