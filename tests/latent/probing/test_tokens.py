from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from probing_tools import KEYS, Recorder, linear_manager
from tdprobe.latent import ActivationCaching, Probing

TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
LAYER = r"model\.layers\.2$"
NAME = "model.layers.2"


def encoding(side: str) -> dict[str, Tensor]:
    width = max(map(len, TEXTS))
    ids, mask = (
        torch.zeros(len(TEXTS), width, dtype=torch.long),
        torch.zeros(len(TEXTS), width, dtype=torch.long),
    )
    for row, text in enumerate(TEXTS):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: nn.Module) -> list[Tensor]:
    """Hidden states of each text without any padding, (tokens, width)."""
    found = []
    for text in TEXTS:
        with ActivationCaching(LAYER).prepare(model) as hooked, torch.no_grad():
            hooked(input_ids=torch.tensor([text]))
        found.append(hooked.hooking_context.cache[NAME][0])
    return found


def probed(model: nn.Module, side: str, labels: Any, tokens: Any, **options: Any) -> tuple[Tensor, Any]:
    recorder = Recorder()
    probing = Probing(LAYER, recorder, additional_keys=["labels"], tokens=tokens, **options)
    with probing.prepare(model) as hooked, torch.no_grad():
        hooked(encoding(side), labels=labels)
    ((_, _, rows, items),) = recorder.steps
    return rows, items["labels"]


def per_token(side: str) -> Tensor:
    """A label that names the text and the position of every real token, -1 at pads."""
    mask = encoding(side)["attention_mask"]
    position = mask.cumsum(1) - 1
    return torch.where(mask.bool(), 10 * torch.arange(3).unsqueeze(1) + position, -1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("tokens", "skip_first", "wanted"),
    [
        ("last", 0, [(0, 3), (1, 1), (2, 2)]),
        ("all", 0, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]),
        ("all", 1, [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 2)]),
        (slice(1, 3), 0, [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)]),
        (-2, 0, [(0, 2), (1, 0), (2, 1)]),
        (2, 0, [(0, 2), (2, 2)]),
    ],
)
def test_rows_and_labels_of_the_selected_tokens(
    tiny_llama: nn.Module, side: str, tokens: Any, skip_first: int, wanted: list[tuple[int, int]]
) -> None:
    states = alone(tiny_llama)
    expected = torch.stack([states[text][position] for text, position in wanted])
    rows, labels = probed(tiny_llama, side, torch.tensor([7, 8, 9]), tokens, skip_first=skip_first)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    assert labels.tolist() == [7 + text for text, _ in wanted]
    _, labels = probed(tiny_llama, side, per_token(side), tokens, skip_first=skip_first)
    assert labels.tolist() == [10 * text + position for text, position in wanted]


@pytest.mark.parametrize("side", ["left", "right"])
def test_means_leave_out_padding(tiny_llama: nn.Module, side: str) -> None:
    rows, labels = probed(tiny_llama, side, torch.tensor([7, 8, 9]), "mean")
    torch.testing.assert_close(rows, torch.stack([x.mean(0) for x in alone(tiny_llama)]), atol=1e-5, rtol=1e-4)
    assert labels.tolist() == [7, 8, 9]


@pytest.mark.parametrize("kind", [list, np.array, lambda x: TensorDict({"l": torch.tensor(x)})["l"]])
def test_labels_of_any_kind_are_repeated(tiny_llama: nn.Module, kind: Any) -> None:
    _, labels = probed(tiny_llama, "left", kind([7, 8, 9]), "all")
    assert list(labels) == [7, 7, 7, 7, 8, 8, 9, 9, 9]
    _, labels = probed(tiny_llama, "left", per_token("left").numpy(), "last")
    assert labels.tolist() == [3, 11, 22]


def test_labels_of_several_values_are_kept_together(tiny_llama: nn.Module) -> None:
    targets = torch.arange(6.0).reshape(3, 2)
    _, labels = probed(tiny_llama, "left", targets, "last")
    assert torch.equal(labels, targets)
    _, labels = probed(tiny_llama, "left", targets, slice(0, 1))
    assert torch.equal(labels, targets)


def test_a_tensordict_brings_the_same(tiny_llama: nn.Module) -> None:
    recorder = Recorder()
    with (
        Probing(LAYER, recorder, additional_keys=KEYS, tokens="last").prepare(tiny_llama) as hooked,
        torch.no_grad(),
    ):
        hooked(TensorDict(encoding("left") | {"labels": torch.tensor([7, 8, 9]), "step_type": "fit"}))
    ((_, _, rows, items),) = recorder.steps
    assert torch.equal(rows, probed(tiny_llama, "left", torch.tensor([7, 8, 9]), "last")[0])
    assert items["step_type"] == "fit" and items["labels"].tolist() == [7, 8, 9]


@pytest.mark.parametrize("direction", ["fwd_pre", "fwd_pre_kwargs", "fwd_kwargs"])
def test_inputs_are_selected_alike(tiny_llama: nn.Module, direction: str) -> None:
    recorder = Recorder()
    # self_attn is called by keywords only, and returns a tuple.
    probing = Probing(r"model\.layers\.2\.self_attn$", recorder, directions=[direction], tokens="last")
    with ActivationCaching(r"model\.layers\.2\.(input_layernorm|self_attn)$").prepare(tiny_llama) as cached:
        with probing.prepare(tiny_llama) as hooked, torch.no_grad():
            hooked(encoding("left"))
    part = "self_attn" if direction == "fwd_kwargs" else "input_layernorm"
    assert torch.equal(recorder.steps[0][2], cached.hooking_context.cache[f"{NAME}.{part}"][:, -1])


def test_language_model_labels_stay_with_the_probe(tiny_llama: nn.Module) -> None:
    recorder = Recorder()
    with Probing(LAYER, recorder, additional_keys=["labels"], tokens="last").prepare(tiny_llama) as hooked:
        # Three labels for three texts: the model itself would want one for each token.
        out = hooked(encoding("left"), labels=torch.tensor([0, 1, 0]))
        td = hooked(TensorDict(encoding("left") | {"labels": torch.tensor([0, 1, 0])}))
    assert out.loss is None and torch.equal(td["output"], out.logits)


def test_early_stop_skips_the_rest_of_the_model(tiny_llama: nn.Module) -> None:
    ran: list[Any] = []
    handle = tiny_llama.model.layers[3].register_forward_hook(lambda *_: ran.append(1))
    recorder = Recorder()
    try:
        with Probing(LAYER, recorder, tokens="last", early_stop=True).prepare(tiny_llama) as hooked:
            assert hooked(encoding("right")) is None
            assert hooked(encoding("right")) is None
    finally:
        handle.remove()
    assert len(recorder.steps) == 2 and not ran


def test_generated_steps_are_probed_by_their_own_clause(tiny_llama: nn.Module) -> None:
    recorder = Recorder()
    with Probing(LAYER, recorder, tokens="generated").prepare(tiny_llama) as hooked:
        hooked.generate(**encoding("left"), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [tuple(data.shape) for *_, data, _ in recorder.steps] == [(3, 32), (3, 32)]


def test_half_precision_rows_are_probed_in_float32(tiny_llama: nn.Module) -> None:
    class Widen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4).bfloat16()

        def forward(self, input: Tensor) -> Tensor:
            return self.layer(input.bfloat16())

    model, manager = Widen(), linear_manager()
    rows = torch.randn(20, 3)
    torch.manual_seed(0)
    with Probing("layer", manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
        hooked(rows, labels=torch.arange(20) % 2, step_type="fit")
    torch.manual_seed(0)
    twin = linear_manager().probe_factory("layer", "fwd")
    twin.step(model(rows).float(), labels=torch.arange(20) % 2, step_type="fit")
    for a, b in zip(manager.estimators["layer_fwd"].parameters(), twin._estimator.parameters(), strict=True):
        assert torch.equal(a, b)


def test_padding_that_reaches_probes_is_named_once(tiny_llama: nn.Module) -> None:
    recorder = Recorder()
    with Probing(LAYER, recorder).prepare(tiny_llama) as hooked, torch.no_grad():
        with pytest.warns(UserWarning, match="padded.*tokens="):
            hooked(encoding("left"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hooked(encoding("left"))
    # Without a clause the value comes as the module gave it, as documented.
    assert recorder.steps[0][2].shape == (3, 4, 32)
    with Probing(LAYER, recorder).prepare(tiny_llama) as hooked, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        hooked(input_ids=torch.tensor([[5, 6]]))


def test_padding_without_a_mask_is_refused(tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llama.config, "pad_token_id", 0)
    with pytest.raises(ValueError, match="attention_mask"):
        with Probing(LAYER, Recorder(), tokens="last").prepare(tiny_llama) as hooked:
            hooked(input_ids=encoding("right")["input_ids"])


def test_a_module_called_on_its_own_has_no_tokens(tiny_llama: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="called on its own"):
        with Probing(r"model\.norm$", Recorder(), tokens="last").prepare(tiny_llama):
            tiny_llama.model.norm(torch.ones(1, 2, 32))
