"""Every listed pattern hooks exactly the modules that it stands for, and shapes say what follows the input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdprobe.compare import LayerInfo, list_layers
from tdprobe.hooks import match_modules


def on_tokens(model: nn.Module, **more: str) -> Callable[[int, int], Any]:
    def run(batch: int, tokens: int) -> Any:
        ids = torch.ones(batch, tokens, dtype=torch.long)
        return model(input_ids=ids, **dict.fromkeys(more.values(), ids))

    return run


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


class Experts(nn.Module):
    """Layers of two kinds, with experts in every other one, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Linear(4, 4)} if i % 2 else {f"expert_{j}": nn.Linear(4, 4) for j in range(i + 1)})
            for i in range(12)
        )
        self.head_1 = nn.Linear(4, 2)
        self.head_2 = nn.Linear(4, 3)
        self.tied = self.head_1

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer.values():
                x = part(x)
        return self.head_2(x)


def experts() -> nn.Module:
    return Experts()


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5Model

    return T5Model(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Callable[[int, int], Any]]]] = {
    "conv net": (conv_net, lambda model: lambda b, t: model(torch.ones(b, 1, 8, 8))),
    "experts": (experts, lambda model: lambda b, t: model(torch.ones(b, t, 4))),
    "bert": (bert, on_tokens),
    "t5": (t5, lambda model: on_tokens(model, decoder="decoder_input_ids")),
}


@pytest.fixture(params=["tiny_llama", *MODELS])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[int, int], Any]]:
    if request.param == "tiny_llama":
        model = request.getfixturevalue("tiny_llama")
        return model, on_tokens(model)
    make, runner = MODELS[request.param]
    model = make().eval()
    return model, runner(model)


@pytest.mark.parametrize("collapse", [True, False])
def test_every_pattern_hooks_exactly_the_modules_of_its_row(case: Any, collapse: bool) -> None:
    model, run = case
    listed = list_layers(model, run, collapse=collapse)
    seen: list[str] = []
    for info in listed:
        matched = match_modules(model, info.pattern)
        assert len(matched) == info.count, info
        assert {type(found).__name__ for found in matched.values()} == {info.module}
        seen += matched
    # Together the rows cover every module once.
    assert sorted(seen) == sorted(match_modules(model, ""))
    assert collapse or all(info.count == 1 for info in listed)


def find(listed: list[LayerInfo], name: str) -> LayerInfo:
    (found,) = [info for info in listed if info.name == name]
    return found


def test_a_decoder_is_listed_in_a_dozen_rows_with_shapes(tiny_llama: nn.Module) -> None:
    listed = list_layers(tiny_llama, on_tokens(tiny_llama))
    blocks = find(listed, "model.layers.{0..3}")
    assert blocks == LayerInfo("model.layers.{0..3}", r"model\.layers\.\d+$", "LlamaDecoderLayer", "(b, t, 32)", 4)
    assert find(listed, "model.layers.{0..3}.mlp.up_proj").shape == "(b, t, 64)"
    assert find(listed, "lm_head").shape == "(b, t, 128)"
    assert len(listed) < 20 < len(list_layers(tiny_llama, on_tokens(tiny_llama), collapse=False))


def test_a_model_that_takes_token_ids_runs_by_itself(tiny_llama: nn.Module) -> None:
    from transformers import T5Config, T5Model

    assert list_layers(tiny_llama) == list_layers(tiny_llama, on_tokens(tiny_llama))
    t5 = T5Model(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    assert list_layers(t5) == list_layers(t5, on_tokens(t5, decoder="decoder_input_ids"))


def test_a_model_that_does_not_run_on_token_ids_says_what_to_give() -> None:
    from transformers import ViTConfig, ViTModel

    with pytest.raises(ValueError, match=r"Sequential is no model of transformers.*run\(b, t\)"):
        list_layers(conv_net())
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"ViTModel, whose main input is 'pixel_values', did not run on token ids"):
        list_layers(ViTModel(ViTConfig(**sizes, image_size=32)))


def test_modules_that_differ_in_class_or_shape_are_apart() -> None:
    model = conv_net()
    listed = list_layers(model, lambda b, t: model(torch.ones(b, 1, 8, 8)))
    found = {info.name: (info.module, info.shape) for info in listed}
    assert found == {
        "0": ("Conv2d", "(b, 4, 6, 6)"),
        "1": ("ReLU", "(b, 4, 6, 6)"),
        "2": ("Conv2d", "(b, 4, 4, 4)"),
        "3": ("ReLU", "(b, 4, 4, 4)"),
        "4": ("Flatten", "(b, 64)"),
        "5": ("Linear", "(b, 10)"),
    }


def test_gaps_are_shown_and_a_module_with_two_names_is_there_once() -> None:
    model = Experts()
    listed = list_layers(model, lambda b, t: model(torch.ones(b, t, 4)))
    mlp = find(listed, "layers.{1,3,5,7,9,11}.mlp")
    assert mlp.count == 6 and mlp.pattern == r"layers\.\d+\.mlp$"
    # head_1 never ran; tied is the same module.
    assert find(listed, "head_1").shape == "" and find(listed, "head_2").shape == "(b, t, 3)"
    assert not [info for info in listed if "tied" in info.name]
    assert sum(info.count for info in listed if "expert" in info.name) == 1 + 3 + 5 + 7 + 9 + 11


class Mixing(nn.Module):
    """Joins batch and tokens, appends a token, and drops the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.longer, self.single = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Any:
        self.flat(x.reshape(-1, 4))
        self.longer(torch.cat([x, x[:, :1]], 1))
        return self.single(x[0, 0])


def test_axes_that_follow_the_sizes_have_names() -> None:
    model = Mixing()
    shapes = {info.name: info.shape for info in list_layers(model, lambda b, t: model(torch.ones(b, t, 4)))}
    assert shapes == {"flat": "(b*t, 4)", "longer": "(b, 6|8, 4)", "single": "(4)"}


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_of_the_model_is_changed(hooks_of: Any, fail: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, hooks, rng = [part.training for part in model.modules()], hooks_of(model), torch.get_rng_state()

    def run(batch: int, tokens: int) -> None:
        out = model(torch.full((batch, 4), 3.0))
        assert not out.requires_grad
        if fail and batch == 3:
            raise OSError("broken")

    if fail:
        with pytest.raises(OSError, match="broken"):
            list_layers(model, run)
    else:
        assert [info.shape for info in list_layers(model, run)] == ["(b, 4)"] * 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes and hooks_of(model) == hooks
    assert torch.equal(torch.get_rng_state(), rng)


def test_special_characters_in_names_are_taken_literally() -> None:
    model = nn.ModuleDict({"a+b#1": nn.Linear(2, 2), "a+b#2": nn.Linear(2, 2), "aab#1": nn.Linear(2, 2)})
    listed = list_layers(model, lambda b, t: None)
    assert [(info.name, info.count) for info in listed] == [("a+b#{1..2}", 2), ("aab#1", 1)]
    assert [list(match_modules(model, info.pattern)) for info in listed] == [["a+b#1", "a+b#2"], ["aab#1"]]
    assert all(re.compile(info.pattern) for info in listed)
