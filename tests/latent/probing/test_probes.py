from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tdprobe.errors import TdprobeError
from tdprobe.latent import BilinearProbe, Probe


class Recorder:
    """An estimator that keeps what it is given, and under which mode."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.grad: list[bool] = []

    def fit(self, *data: Any, y: Any) -> None:
        self.calls.append(("fit", *data, y))
        self.grad.append(torch.is_grad_enabled() and not torch.is_inference_mode_enabled())

    def predict(self, *data: Any) -> Any:
        self.calls.append(("predict", *data))
        return "prediction"


def build(fit: bool = True, **options: Any) -> tuple[Probe, Recorder, list[Any]]:
    seen: list[Any] = []
    recorder = Recorder()
    on_fit = (lambda p, y: seen.append(("fit", p, y))) if fit else None
    return Probe(recorder, lambda p, y: seen.append(("predict", p, y)), on_fit, **options), recorder, seen


DATA = torch.arange(12.0).reshape(2, 3, 2)


def test_fit_then_predict_with_their_callbacks() -> None:
    probe, recorder, seen = build()
    probe.step(DATA, labels="y", step_type="fit", other="ignored")
    probe.step(DATA, labels="z", step_type="predict")
    assert [call[0] for call in recorder.calls] == ["fit", "predict", "predict"]
    assert recorder.calls[0][-1] == "y"
    for call in recorder.calls:
        assert torch.equal(call[1], DATA.flatten(1))
    assert seen == [("fit", "prediction", "y"), ("predict", "prediction", "z")]


def test_without_a_fit_callback_nothing_is_predicted_after_a_fit() -> None:
    probe, recorder, seen = build(fit=False)
    probe.step(DATA, labels="y", step_type="fit")
    assert [call[0] for call in recorder.calls] == ["fit"] and not seen


@pytest.mark.parametrize("step_type", ["train", None, "FIT", 1])
def test_another_step_type_is_refused(step_type: Any) -> None:
    probe, recorder, _ = build()
    with pytest.raises(ValueError, match="'fit' or 'predict', got") as caught:
        probe.step(DATA, labels=None, step_type=step_type)
    assert isinstance(caught.value, TdprobeError) and not recorder.calls
    with pytest.raises(ValueError, match="got None"):
        probe.step(DATA, labels=None)


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (DATA, DATA.flatten(1)),
        ((None, (DATA, torch.zeros(1))), DATA.flatten(1)),
        ({"hidden": DATA}, DATA.flatten(1)),
        (torch.arange(3.0), torch.arange(3.0).unsqueeze(1)),
        (DATA.bfloat16(), DATA.flatten(1)),
        (DATA.double(), DATA.flatten(1).double()),
        (DATA.long(), DATA.flatten(1).long()),
    ],
)
def test_the_default_preprocessing(data: Any, rows: Tensor) -> None:
    probe, recorder, _ = build()
    probe.step(data, labels=None, step_type="fit")
    torch.testing.assert_close(recorder.calls[0][1], rows, atol=0, rtol=0)


def test_rows_are_detached_and_immune_to_later_writes() -> None:
    probe, recorder, _ = build(fit=False)
    live = DATA.clone().requires_grad_() * 1
    probe.step(live, labels=None, step_type="fit")
    kept = recorder.calls[0][1]
    with torch.no_grad():
        live.zero_()
    assert torch.equal(kept, DATA.flatten(1)) and not kept.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fitting_can_use_gradients_in_any_mode(mode: Any) -> None:
    probe, recorder, _ = build()
    with mode():
        probe.step(DATA * 1, labels=None, step_type="fit")
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert recorder.grad == [True]
    assert not recorder.calls[0][1].is_inference()


@pytest.mark.parametrize("data", [(), (None,), "text", {}])
def test_data_without_a_tensor_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(data).__name__} without a tensor.*data_preprocess_callback"):
        build()[0].step(data, labels=None, step_type="fit")


def test_a_preprocessing_callback_replaces_the_default() -> None:
    probe, recorder, _ = build(data_preprocess_callback=lambda data: data[0][:, -1])
    probe.step((DATA,), labels=None, step_type="fit")
    assert torch.equal(recorder.calls[0][1], DATA[:, -1])


# Bilinear probes.


class Pair:
    """What the documentation says a bilinear probe does, spelled out."""

    def __init__(self, h1: str, h2: str) -> None:
        self.h1, self.h2 = h1, h2
        self.held: dict[str, int] = {}
        self.fits: list[tuple[int, int]] = []

    def step(self, key: str, value: int) -> None:
        if key not in (self.h1, self.h2):
            return
        self.held[key] = value
        if {self.h1, self.h2} == set(self.held):
            self.fits.append((self.held[self.h1], self.held[self.h2]))
            self.held = {}

    def end(self) -> list[tuple[str, str]]:
        waiting = [(self.h1, self.h2)] if self.held else []
        self.held = {}
        return waiting


@pytest.mark.parametrize(("h1", "h2"), [("a", "b"), ("a", "a")])
def test_a_bilinear_probe_follows_its_description_in_every_order(h1: str, h2: str) -> None:
    events = ["a", "b", "c", "before", "after"]
    for order in itertools.product(events, repeat=5):
        recorder, model = Recorder(), Pair(h1, h2)
        probe = BilinearProbe(h1, h2, recorder, lambda p, y: None, None, lambda data: data)
        for number, event in enumerate(order):
            if event == "before":
                assert probe.before_all() is None
                model.end()
            elif event == "after":
                assert probe.after_all() == model.end(), order
            else:
                probe.step(number, key=event, labels=number, step_type="fit")
                model.step(event, number)
            assert probe.is_waiting == bool(model.held), order
        assert [call[1:3] for call in recorder.calls] == model.fits, order


def test_a_bilinear_probe_gives_both_values_and_the_labels() -> None:
    recorder, seen = Recorder(), []
    probe = BilinearProbe("a", "b", recorder, lambda p, y: seen.append((p, y)))
    for step_type in ("fit", "predict"):
        probe.step(DATA + 1, key="b", labels="y", step_type=step_type)
        probe.step(DATA, key="a", labels="y", step_type=step_type)
    assert [call[0] for call in recorder.calls] == ["fit", "predict"]
    for call in recorder.calls:
        assert torch.equal(call[1], DATA.flatten(1)) and torch.equal(call[2], DATA.flatten(1) + 1)
    assert recorder.calls[0][-1] == "y" and seen == [("prediction", "y")]


def test_the_step_type_counts_when_the_pair_is_complete() -> None:
    probe = BilinearProbe("a", "b", Recorder(), lambda p, y: None)
    probe.step(DATA, key="a", labels=None, step_type="nonsense")
    with pytest.raises(ValueError, match="'nonsense'"):
        probe.step(DATA, key="b", labels=None, step_type="nonsense")
    assert not probe.is_waiting


def test_what_waits_is_immune_to_later_writes() -> None:
    recorder = Recorder()
    probe = BilinearProbe("a", "b", recorder, lambda p, y: None, None, lambda data: data)
    live = DATA.clone()
    probe.step(live, key="a", labels=None, step_type="fit")
    live.zero_()
    probe.step(DATA, key="b", labels=None, step_type="fit")
    assert torch.equal(recorder.calls[0][1], DATA)


def test_a_bilinear_step_needs_its_arguments() -> None:
    probe = BilinearProbe("a", "b", Recorder(), lambda p, y: None)
    with pytest.raises(TypeError):
        probe.step(DATA, key="a")
