from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from probing_tools import KEYS, Recorder, X, Y, batch, net
from tdprobe.errors import TdprobeError
from tdprobe.latent import ActivationCaching, Probing


def test_items_come_from_the_tensordict() -> None:
    recorder = Recorder()
    nested = TensorDict({"weight": torch.ones(2), "other": torch.zeros(2)}, batch_size=[2])
    keys = [*KEYS, ("meta", "weight")]
    with Probing("first", recorder, additional_keys=keys).prepare(net()) as hooked:
        td = batch(meta=nested)
        assert hooked(td) is td
    items = recorder.steps[0][3]
    assert set(items) == {"labels", "step_type", "meta"}
    assert torch.equal(items["labels"], Y)
    assert type(items["step_type"]) is str and items["step_type"] == "fit"
    assert set(items["meta"].keys()) == {"weight"}
    assert set(td.keys()) == {"input", "labels", "step_type", "meta", "output"}


def test_a_probe_of_the_model_itself_has_the_items_of_its_call() -> None:
    model, recorder = net(), Recorder()
    probing = Probing(r"td_module\.module$", recorder, relative=False, additional_keys=KEYS)
    with probing.prepare(model) as hooked:
        hooked(batch())
    ((_, _, data, items),) = recorder.steps
    assert torch.equal(data, model(X)) and torch.equal(items["labels"], Y)


def test_a_string_is_a_string_after_stacking_too() -> None:
    recorder = Recorder()
    with Probing("first", recorder, additional_keys=KEYS).prepare(net()) as hooked:
        hooked(torch.stack([batch()[0], batch()[1]]))
    assert recorder.steps[0][3]["step_type"] == "fit"
    assert torch.equal(recorder.steps[0][3]["labels"], Y)


@pytest.mark.parametrize(
    "call",
    [
        lambda hooked: hooked(X, labels=Y, step_type="fit"),
        lambda hooked: hooked(input=X, labels=Y, step_type="fit"),
        lambda hooked: hooked({"input": X}, labels=Y, step_type="fit"),
        lambda hooked: hooked({"input": X, "labels": Y, "step_type": "fit"}),
    ],
)
def test_items_come_by_keyword(call: Any) -> None:
    model, recorder = net(), Recorder()
    with Probing("first", recorder, additional_keys=KEYS).prepare(model) as hooked:
        call(hooked)
    ((_, _, data, items),) = recorder.steps
    assert torch.equal(data, model.first(X))
    assert items["labels"] is Y and items["step_type"] == "fit" and len(items) == 2


def test_keywords_come_before_keys() -> None:
    recorder = Recorder()
    with Probing("first", recorder, additional_keys=KEYS).prepare(net()) as hooked:
        hooked(batch(), step_type="predict")
    assert recorder.steps[0][3]["step_type"] == "predict"


def test_a_missing_key_is_a_key_error(hooks_of: Any) -> None:
    model, recorder = net(), Recorder()
    td = TensorDict({"input": X, "label": Y, "step_type": "fit"})
    with pytest.raises(KeyError, match="lacks 'labels'.*did you mean 'label'") as caught:
        with Probing("first", recorder, additional_keys=KEYS).prepare(model) as hooked:
            hooked(td)
    assert isinstance(caught.value, TdprobeError) and not recorder.steps and hooks_of(model) == 0


@pytest.mark.parametrize(
    "call", [lambda hooked: hooked(X), lambda hooked: hooked(X, labels=Y), lambda hooked: hooked(input=X)]
)
def test_tensors_without_items_are_a_type_error(call: Any) -> None:
    with pytest.raises(TypeError, match="'step_type' (is|are) missing.*keywords") as caught:
        with Probing("first", Recorder(), additional_keys=KEYS).prepare(net()) as hooked:
            call(hooked)
    assert isinstance(caught.value, TdprobeError)


def test_a_direct_call_has_no_labels_of_an_earlier_batch() -> None:
    model, recorder = net(), Recorder()
    with Probing("first", recorder, additional_keys=KEYS).prepare(model) as hooked:
        for direct in (model, model.first):
            hooked(batch())
            with pytest.raises(RuntimeError, match="no labels for this call"):
                direct(X)
        hooked(batch())
        with hooked.disable_context_hooks():
            model(X)
    assert len(recorder.steps) == 3
    with Probing("first", recorder).prepare(model):
        model(X)
    assert len(recorder.steps) == 4


def test_a_failed_call_leaves_no_labels() -> None:
    model, recorder = net(), Recorder()
    with Probing("first", recorder, additional_keys=KEYS).prepare(model) as hooked:
        with pytest.raises(RuntimeError, match="mat1 and mat2|shape"):
            hooked(batch(input=torch.ones(2, 5)))
        with pytest.raises(RuntimeError, match="no labels for this call"):
            model.first(X)
        hooked(batch())


def test_backward_steps_have_the_labels_of_their_call() -> None:
    model, recorder = net(), Recorder()
    with Probing("first", recorder, directions=["bwd_pre"], additional_keys=KEYS).prepare(model) as hooked:
        hooked(batch())["output"].sum().backward()
        assert torch.equal(recorder.steps[0][3]["labels"], Y)
        with pytest.raises(RuntimeError, match="no labels for this call"):
            model(X).sum().backward()


def test_a_tensordict_module_of_the_user_brings_items_when_called_itself() -> None:
    model, recorder = net(), Recorder()
    chain = TensorDictSequential(TensorDictModule(model, ["x"], ["y"]))
    td = TensorDict({"x": X, "labels": Y, "step_type": "fit"}, batch_size=[2])
    with Probing(r"module\.0\.module\.first", recorder, additional_keys=KEYS).prepare(chain) as hooked:
        hooked(td.clone())
        chain(td.clone())
        with pytest.raises(RuntimeError, match="no labels for this call"):
            model(X)
        with pytest.raises(KeyError):
            chain(td.exclude("labels"))
    assert [items["labels"] is not None for *_, items in recorder.steps] == [True, True]


# What the model gets.


class Labelled(nn.Module):
    """A model whose forward takes labels, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.seen: list[set[str]] = []

    def forward(self, x: Tensor, labels: Tensor | None = None, step_type: Any = None, scale: float = 1) -> Tensor:
        given = {"labels": labels, "step_type": step_type}
        self.seen.append({name for name, value in given.items() if value is not None})
        return self.layer(x) * scale


@pytest.mark.parametrize(
    "call",
    [
        lambda hooked: hooked(TensorDict({"x": X, "labels": Y, "step_type": "fit", "scale": torch.tensor(2.0)})),
        lambda hooked: hooked(x=X, labels=Y, step_type="fit"),
        lambda hooked: hooked({"x": X, "labels": Y, "step_type": "fit"}),
    ],
)
def test_items_are_withheld_from_the_model(call: Any) -> None:
    model, recorder = Labelled(), Recorder()
    with Probing("layer", recorder, additional_keys=KEYS).prepare(model) as hooked:
        call(hooked)
    assert model.seen == [set()] and set(recorder.steps[0][3]) == set(KEYS)


def test_in_keys_hand_items_to_the_model_as_well() -> None:
    model, recorder = Labelled(), Recorder()
    keys = {"x": "x", "labels": "labels"}
    with Probing("layer", recorder, additional_keys=KEYS).prepare(model, keys) as hooked:
        hooked(TensorDict({"x": X, "labels": Y, "step_type": "fit"}))
    assert model.seen == [{"labels"}]


def test_items_are_withheld_while_the_block_lasts() -> None:
    model = Labelled()
    td = TensorDict({"x": X, "labels": Y, "step_type": "fit"})
    context = Probing("layer", Recorder(), additional_keys=KEYS).prepare(model)
    with context as hooked:
        hooked(td.clone())
        with hooked.disable_context_hooks():
            hooked(td.clone())
    with ActivationCaching("layer").prepare(model) as hooked:
        hooked(td.exclude("step_type"))
    assert model.seen == [set(), set(), {"labels"}]
