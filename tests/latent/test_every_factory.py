"""What has to hold on real architectures holds for every factory, against hooks that are set by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.contexts import CompositeHookingContextFactory
from tdprobe.hooks import first_tensor
from tdprobe.latent import (
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    LayerScoring,
    Probing,
    SteeringVectors,
)

IDS = torch.tensor([[5, 3, 9, 17, 2, 8], [11, 2, 13, 4, 0, 0]])
RIGHT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
LEFT = {"input_ids": torch.stack([IDS[0], IDS[1].roll(2)])}
LEFT["attention_mask"] = (LEFT["input_ids"] > 0).long()
INPUTS = {"right": RIGHT, "left": LEFT}
KINDS = ["caching", "scoring", "probing", "steering", "patching", "addition"]
OBSERVERS = ["caching", "scoring", "probing", "addition"]
PLACES = {
    "llama layer": ("llama", "model.layers.1"),
    "llama attention": ("llama", "model.layers.1.self_attn"),
    "llama body": ("llama", "model"),
    "bert layer": ("bert", "encoder.layer.1"),
    "bert attention": ("bert", "encoder.layer.1.attention.self"),
}


def unhooked(model: Any) -> nn.Module:
    """Make the same model anew, without the capture hooks that transformers has put on it for another test."""
    twin = type(model)(copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.fixture(scope="module")
def models(tiny_llama: nn.Module) -> dict[str, nn.Module]:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        return {"llama": unhooked(tiny_llama), "bert": BertModel(config).eval()}


def other_than(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return other texts with the same padding."""
    return inputs | {"input_ids": (inputs["input_ids"] + 40) * inputs["attention_mask"]}


def outcome(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def by_hand(model: nn.Module, name: str, inputs: Any, edit: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return what a module gave, and what the model did after its first tensor was edited."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value = output if isinstance(output, Tensor) else output[0]
        seen.append(value.clone())
        if edit is None:
            return None
        if isinstance(output, Tensor):
            return edit(value)
        if isinstance(output, tuple):
            return (edit(value), *output[1:])
        output[next(iter(output))] = edit(value)
        return output

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        return seen, outcome(model(**inputs))
    finally:
        handle.remove()


def rows_of(value: Tensor, mask: Tensor, tokens: str) -> Tensor:
    """Select rows as the clause says, text by text."""
    real = [text[keep.bool()] for text, keep in zip(value, mask, strict=True)]
    if tokens == "all":
        return torch.cat(real)
    return torch.stack([text[-1] if tokens == "last" else text.mean(0) for text in real])


def chosen(mask: Tensor, tokens: str) -> Tensor:
    """Return where the tokens of a clause are, (batch, tokens) bool."""
    where = mask.bool()
    return where if tokens == "all" else where & (where.flip(1).cumsum(1).flip(1) == 1)


class Keep:
    """A probe that keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def step(self, data: Any) -> None:
        self.seen.append(data)


class Run:
    """One factory on one model: what it read, and what the model gave.

    Args:
        kind: Which factory.
        name: The module.
        options: Of the factory.
    """

    def __init__(self, kind: str, name: str, **options: Any) -> None:
        self.kind, self.probe, self.batches = kind, Keep(), []
        pattern = re.escape(name) + "$"
        self.factory = {
            "caching": lambda: ActivationCaching(pattern, **options),
            "scoring": lambda: LayerScoring(pattern, skip_first=0, **options),
            "probing": lambda: Probing(pattern, lambda *_: self.probe, **options),
            "steering": lambda: SteeringVectors([name], lambda module_key, output: 2 * output, **options),
            "patching": lambda: ActivationPatching([name], **options),
            "addition": lambda: ActivationAddition([name], **options),
        }[kind]()
        self.name = name

    def prepare(self, model: nn.Module) -> Any:
        self.context = self.factory.prepare(model)
        if self.kind == "scoring":
            self.context.consume = self.batches.append
        return self.context

    def call(self, hooked: Any, inputs: Any, other: Any = None) -> Any:
        other = other_than(inputs) if other is None else other
        if self.kind == "patching":
            return hooked.patch(inputs, other)
        if self.kind == "addition":
            self.vectors = hooked.contrast(inputs, other)
            return None
        return hooked(**inputs)

    def read(self) -> Any:
        """Return what an observer got."""
        if self.kind == "caching":
            return self.context.cache[self.name]
        if self.kind == "scoring":
            return self.batches[-1].rows[self.name]
        return self.vectors["steer", self.name] if self.kind == "addition" else first_tensor(self.probe.seen[-1])


# Tensors, tuples and ModelOutputs; both padding sides; the value that is read, and the one that is written.


@pytest.mark.parametrize("side", INPUTS)
@pytest.mark.parametrize("tokens", ["all", "last", "mean"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", OBSERVERS)
def test_what_is_read(models: Any, kind: str, place: str, tokens: str, side: str) -> None:
    model, name, inputs = models[PLACES[place][0]], PLACES[place][1], INPUTS[side]
    run = Run(kind, name, tokens=tokens)
    with torch.no_grad(), run.prepare(model) as hooked:
        output = run.call(hooked, inputs)
    seen, bare = by_hand(model, name, inputs)
    expected = rows_of(seen[0], inputs["attention_mask"], tokens)
    if kind == "addition":
        others = rows_of(by_hand(model, name, other_than(inputs))[0][0], inputs["attention_mask"], tokens)
        expected = expected.mean(0) - others.mean(0)
    else:
        assert torch.equal(outcome(output), bare)
    torch.testing.assert_close(run.read(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", INPUTS)
@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["steering", "patching"])
def test_what_is_written(models: Any, kind: str, place: str, tokens: str, side: str) -> None:
    model, name, inputs = models[PLACES[place][0]], PLACES[place][1], INPUTS[side]
    where, other = chosen(inputs["attention_mask"], tokens), other_than(inputs)
    clean = by_hand(model, name, inputs)[0][0]

    def edit(value: Tensor) -> Tensor:
        return torch.where(where.unsqueeze(-1), 2 * value if kind == "steering" else clean, value)

    _, expected = by_hand(model, name, inputs if kind == "steering" else other, edit)
    run = Run(kind, name, tokens=tokens)
    with torch.no_grad(), run.prepare(model) as hooked:
        assert torch.equal(outcome(run.call(hooked, inputs)), expected)
    assert not torch.equal(expected, by_hand(model, name, inputs if kind == "steering" else other)[1])


# Observers see the edit, whichever was entered first and whenever transformers installed hooks of its own.


@pytest.mark.parametrize("captured", ["before", "inside", "never"])
@pytest.mark.parametrize("first", ["edit", "observer"])
@pytest.mark.parametrize("kind", OBSERVERS)
def test_an_observer_sees_the_edit(tiny_llama: nn.Module, kind: str, first: str, captured: str) -> None:
    model, name = unhooked(tiny_llama), "model.layers.1"
    plain, steered = Run(kind, name, tokens="all"), Run(kind, name, tokens="all")
    with torch.no_grad():
        with plain.prepare(model) as hooked:
            plain.call(hooked, RIGHT)
        if captured == "before":
            model(**RIGHT, output_hidden_states=True)
        contexts = [Run("steering", name).prepare(model), steered.prepare(model)]
        with contexts[first == "observer"] as a, contexts[first != "observer"] as b:
            steered.call(b if first == "edit" else a, RIGHT)
            if captured == "inside":
                states = model(**RIGHT, output_hidden_states=True).hidden_states
                assert torch.equal(states[2], by_hand_states(model)[0])
        # The capture of transformers is whole again afterwards.
        assert len(model(**RIGHT, output_hidden_states=True).hidden_states) == 5
    torch.testing.assert_close(steered.read(), 2 * plain.read())


def by_hand_states(model: nn.Module) -> list[Tensor]:
    return by_hand(model, "model.layers.1", RIGHT)[0]


# What cannot mean anything is refused.


@pytest.mark.parametrize(
    ("kind", "tokens"), [(k, t) for k in KINDS for t in ("last", -1, "mean") if t != "mean" or k in OBSERVERS]
)
def test_padding_without_a_mask_is_refused(tiny_llama: nn.Module, kind: str, tokens: Any, hooks_of: Any) -> None:
    model = unhooked(tiny_llama)
    model.config.pad_token_id = 0
    run, bare = Run(kind, "model.layers.1", tokens=tokens), {"input_ids": IDS}
    with pytest.raises(ValueError, match=r"row 1 .* 2 pad tokens \(id 0\)"), torch.no_grad():
        with run.prepare(model) as hooked:
            run.call(hooked, bare, bare)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_matched_and_nothing_fired_are_errors(tiny_llama: nn.Module, kind: str, hooks_of: Any) -> None:
    with pytest.raises(ValueError, match=r"'model\\?\.layer\\?\.1\$?' .*'(model\.)?layers"):
        Run(kind, "model.layer.1").prepare(tiny_llama).__enter__()
    run = Run(kind, "model.layers.1")
    with pytest.raises(RuntimeError, match=r"model\.layers\.1'?.*(ran|never ran) inside the block"):
        with run.prepare(tiny_llama):
            pass
    with torch.no_grad(), run.prepare(tiny_llama) as hooked:
        run.call(hooked, RIGHT)
    assert set(run.context.n_fired) == {"model.layers.1"} and run.context.n_fired["model.layers.1"] >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_required_false_keeps_silence(tiny_llama: nn.Module, kind: str) -> None:
    run = Run(kind, "model.layer.1", required=False)
    with torch.no_grad(), run.prepare(tiny_llama) as hooked:
        assert torch.equal(hooked.td_module.module(**RIGHT).logits, tiny_llama(**RIGHT).logits)
    assert run.context.n_fired == {}


# Nothing of the user's is touched.


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_tensordict_gets_outputs_only(kind: str) -> None:
    sides = {key: {"input": torch.ones(3, 4)} for key in ("patched", "positive", "negative")}
    td = TensorDict({"input": torch.ones(3, 4), **sides}, batch_size=[3])
    given = set(td.keys(include_nested=True, leaves_only=True))
    with torch.no_grad(), Run(kind, "0").prepare(nn.Sequential(nn.Linear(4, 2))) as hooked:
        hooked(td)
    added = set(td.keys(include_nested=True, leaves_only=True)) - given
    assert added == {"addition": set(), "patching": {"output", ("patched", "output")}}.get(kind, {"output"})


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
@pytest.mark.parametrize("kind", KINDS)
def test_no_trace_is_left(tiny_llama: nn.Module, kind: str, error: Any, tmp_path: Any) -> None:
    model, fired = unhooked(tiny_llama), []
    model.model.layers[1].register_forward_hook(lambda *_: fired.append(1))
    model.model.layers[0].requires_grad_(False)
    run = Run(kind, "model.layers.1")

    def facts() -> list[Any]:
        parts = dict(model.named_modules())
        return [
            {name: (type(part), id(part), part.training) for name, part in parts.items()},
            [(p.requires_grad, p.grad) for p in model.parameters()],
            model.config._attn_implementation,
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        ]

    before = facts()
    with pytest.raises(error) if error else nullcontext(), run.prepare(model) as hooked:
        with torch.no_grad():
            run.call(hooked, RIGHT)
            if error:
                raise error
    assert facts() == before
    fired.clear()
    with torch.no_grad():
        expected = model(**RIGHT).logits
        assert fired == [1]
        # A model with a local hook cannot be saved by torch; without it, it can, and a copy computes the same.
        model.model.layers[1]._forward_hooks.clear()
        torch.save(model, tmp_path / "model.pt")
        for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert torch.equal(twin(**RIGHT).logits, expected)


# What leaves a block is ordinary, of the dtype of the activation, and is what it was when it was taken.


@pytest.mark.parametrize("tokens", [None, "all", "last"])
@pytest.mark.parametrize("kind", OBSERVERS)
def test_what_is_kept_out_of_inference_mode_is_ordinary(tiny_llama: nn.Module, kind: str, tokens: Any) -> None:
    run = Run(kind, "model.layers.1", **({"tokens": tokens} if tokens else {}))
    with torch.inference_mode(), run.prepare(tiny_llama) as hooked:
        run.call(hooked, RIGHT)
    kept = run.read()
    if kind == "probing" and tokens is None:
        # Without a clause a probe is shown what the module gave; `Probe` makes it ordinary.
        assert kept.is_inference()
        return
    assert not kept.is_inference()
    weight = torch.ones(kept.shape[-1], requires_grad=True)
    (kept * weight).sum().backward()
    torch.testing.assert_close(weight.grad, kept.reshape(-1, kept.shape[-1]).sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_stay_those_of_the_activation(tiny_llama: nn.Module, kind: str, dtype: torch.dtype) -> None:
    model, run = unhooked(tiny_llama).to(dtype), Run(kind, "model.layers.1", tokens="all")
    with torch.no_grad(), run.prepare(model) as hooked:
        output = run.call(hooked, RIGHT)
    value = run.read() if kind in OBSERVERS else output.logits
    assert value.dtype == dtype and value.isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", OBSERVERS)
def test_what_is_kept_is_immune_to_later_writes(kind: str, mode: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    run = Run(kind, "0", tokens="all")
    with mode(), run.prepare(model) as hooked:
        run.vectors = hooked.contrast(x, -x) if kind == "addition" else hooked(x)
    with torch.no_grad():
        expected, negative = model[0](x).flatten(0, 1), model[0](-x).flatten(0, 1)
    assert (expected < 0).any()
    expected = expected.mean(0) - negative.mean(0) if kind == "addition" else expected
    torch.testing.assert_close(run.read().detach(), expected)


# The pass ends where nobody needs its output, and steps of generation count.


@pytest.mark.parametrize("kind", OBSERVERS)
def test_early_stop_spares_the_rest_and_changes_nothing_that_is_read(tiny_llama: nn.Module, kind: str) -> None:
    model, later = unhooked(tiny_llama), []
    model.model.layers[2].register_forward_hook(lambda *_: later.append(1))
    runs = [Run(kind, "model.layers.1", tokens="all", early_stop=stop) for stop in (False, True)]
    for run in runs:
        later.clear()
        with torch.no_grad(), run.prepare(model) as hooked:
            run.call(hooked, RIGHT)
    assert not later and torch.equal(runs[0].read(), runs[1].read())


# A batch padded on the left, and a single text, whose mask transformers drops; caches that grow, and of a fixed size.
ONE = {name: value[:1] for name, value in LEFT.items()}
WAYS = {
    "greedy": (LEFT, {}, 1),
    "beams": (LEFT, {"num_beams": 2}, 2),
    "samples": (LEFT, {"do_sample": True, "num_return_sequences": 3}, 3),
    "fixed cache": (LEFT, {"cache_implementation": "static"}, 1),
    "one text": (ONE, {}, 1),
    "one text, fixed cache": (ONE, {"cache_implementation": "static"}, 1),
    "one text, guessed ahead": (ONE, {"prompt_lookup_num_tokens": 2}, 1),
}


@pytest.mark.parametrize("kind", ["caching", "scoring", "probing", "steering"])
@pytest.mark.parametrize("tokens", ["prompt", "generated"])
@pytest.mark.parametrize("way", WAYS)
def test_prompt_and_generated_tokens(tiny_llama: nn.Module, kind: str, tokens: str, way: str) -> None:
    options = {"occurrences": "all"} if kind == "caching" else {}
    run, touched = Run(kind, "model.layers.1", tokens=tokens, **options), []
    if kind == "steering":
        run.factory.steer_fn = lambda module_key, output: touched.append(output.shape[0])
    given, how, copies = WAYS[way]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), run.prepare(tiny_llama) as hooked:
        length = {"max_new_tokens": 4, "min_new_tokens": 4}
        hooked.generate(**given, **{"do_sample": False, "pad_token_id": 0} | length | how)
    counts = {
        "caching": lambda: [len(value) for value in run.context.occurrences[run.name]],
        "scoring": lambda: [batch.n for batch in run.batches if batch.n],
        "probing": lambda: [len(value) for value in run.probe.seen],
        "steering": lambda: touched,
    }[kind]()
    # Of four new tokens the last is never fed back. Each beam is a row.
    real, rows = int(given["attention_mask"].sum()), len(given["input_ids"])
    assert counts == ([real * copies] if tokens == "prompt" else [rows * copies] * 3)


@pytest.mark.parametrize("kind", ["caching", "scoring", "probing", "steering"])
def test_encoder_and_decoder_have_tokens_of_their_own(kind: str, hooks_of: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model, touched = T5ForConditionalGeneration(config).eval(), []
    run = Run(kind, "decoder.block.1", tokens="last")
    with torch.no_grad(), pytest.raises(ValueError, match="get_decoder"), run.prepare(model):
        model(**RIGHT, decoder_input_ids=IDS[:, :4])
    assert hooks_of(model) == 0
    run = Run(kind, "block.1", tokens="all", **({"occurrences": "all"} if kind == "caching" else {}))
    if kind == "steering":
        run.factory.steer_fn = lambda module_key, output: touched.append(output.shape[0])
    with torch.no_grad(), run.prepare(model.get_decoder()):
        model.generate(**RIGHT, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    counts = {
        "caching": lambda: [len(value) for value in run.context.occurrences[run.name]],
        "scoring": lambda: [batch.n for batch in run.batches],
        "probing": lambda: [len(value) for value in run.probe.seen],
        "steering": lambda: touched,
    }[kind]()
    assert counts == [2, 2, 2]


# One call in a block of its own, as one expression.


@pytest.mark.parametrize("kind", ["caching", "addition"])
def test_a_block_of_one_call(tiny_llama: nn.Module, kind: str, hooks_of: Any) -> None:
    run = Run(kind, "model.layers.1", tokens="last", early_stop=True)
    with torch.no_grad(), run.prepare(tiny_llama) as hooked:
        run.call(hooked, RIGHT)
    context = run.factory.prepare(tiny_llama)
    call = {"caching": lambda: context.read(**RIGHT), "addition": lambda: context.contrast(RIGHT, other_than(RIGHT))}
    with torch.no_grad():
        found = call[kind]()[run.name if kind == "caching" else ("steer", run.name)]
        assert torch.equal(found, run.read()) and hooks_of(tiny_llama) == 0
        context.factory.required = False
        with context, pytest.raises(RuntimeError, match="twice"):
            call[kind]()
    # In a composite it would leave the other parts out.
    part = Run(kind, "model.layers.1").factory
    with pytest.raises(AttributeError, match="read|contrast"):
        getattr(CompositeHookingContextFactory(part).prepare(tiny_llama), "read" if kind == "caching" else "contrast")
