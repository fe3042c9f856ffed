"""On a GPU, contexts read, write and score what they do on the CPU, and leave no hook; see test_cuda_models.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdprobe import ActivationCaching, LayerScoring, registry
from tdprobe.latent import (
    ActivationAddition,
    ActivationPatching,
    AttentionPatterns,
    MaxActivating,
    NoisedInformation,
    Probing,
    SteeringVectors,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA, NAME, LAYERS = "cuda", "model.layers.2", r"model\.layers\.\d$"
# Every measure that needs no targets.
MEASURES = [name for name in registry.names() if registry.get(name).spec.kind != "supervised"]


@pytest.fixture
def twins(tiny_llama: nn.Module) -> Callable[..., dict[str, nn.Module]]:
    """Return the function that makes the same Llama on the CPU and on the GPU."""

    def make(dtype: torch.dtype) -> dict[str, nn.Module]:
        found = {}
        for device in ("cpu", CUDA):
            model = type(tiny_llama)(copy.deepcopy(tiny_llama.config)).eval()
            model.load_state_dict(tiny_llama.state_dict())
            found[device] = model.to(device, dtype)
        return found

    return make


def inputs(device: Any = CUDA, shift: int = 0, texts: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = (torch.randint(1, 128, (texts, 24), generator=g) + shift) % 127 + 1
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def caching(model: nn.Module, given: Any, other: Any, **options: Any) -> list[Tensor]:
    with ActivationCaching(LAYERS, **options).prepare(model) as hooked:
        hooked(**given)
    return list(hooked.hooking_context.cache.values())


def gradients(model: nn.Module, given: Any, other: Any) -> list[Tensor]:
    with torch.enable_grad(), ActivationCaching(LAYERS, directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(**given).logits.float().square().mean().backward()
    cache = hooked.hooking_context.cache
    return [x for part in (cache["fwd"], cache["bwd"]) for x in part.values()]


def steering(model: nn.Module, given: Any, other: Any, **options: Any) -> list[Tensor]:
    vector = torch.linspace(-1, 1, 32)
    with SteeringVectors([NAME], vector=vector, scale=0.5, **options).prepare(model) as hooked:
        return [hooked(**given).logits]


def addition(model: nn.Module, given: Any, other: Any, **options: Any) -> list[Tensor]:
    found = ActivationAddition([NAME], tokens="last", **options).prepare(model).contrast(given, other)
    return [found["steer", NAME]]


def patching(model: nn.Module, given: Any, other: Any, **options: Any) -> list[Tensor]:
    with ActivationPatching([NAME], **options).prepare(model) as hooked:
        return [hooked.patch(given, other).logits]


def sweep(model: nn.Module, given: Any, other: Any) -> list[Tensor]:
    given, other = ({k: v[:1, :6] for k, v in x.items()} for x in (given, other))
    with ActivationPatching([NAME, "model.layers.0"]).prepare(model) as hooked:
        return [hooked.sweep(given, other, lambda out: out.logits[:, -1, 0])]


def attention(model: nn.Module, given: Any, other: Any) -> list[Tensor]:
    with AttentionPatterns().prepare(model) as hooked:
        hooked(**given)
    return list(hooked.hooking_context.cache.values())


def largest(model: nn.Module, given: Any, other: Any) -> list[Tensor]:
    with MaxActivating(LAYERS, k=3).prepare(model) as hooked:
        hooked(**given)
    return [hooked.hooking_context.samples().values(NAME)]


def probing(model: nn.Module, given: Any, other: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    probe = type("Probe", (), {"step": lambda self, data: seen.append(data)})()
    with Probing(LAYERS, lambda *_: probe, tokens="all", skip_first=1).prepare(model) as hooked:
        hooked(**given)
    return seen


CASES: dict[str, Callable[..., list[Tensor]]] = {
    **{f.__name__: f for f in (caching, gradients, steering, addition, patching, sweep, attention, largest, probing)},
    "caching last": lambda *given: caching(*given, tokens="last"),
    "caching means": lambda *given: caching(*given, tokens="mean"),
    "caching all, stopped": lambda *given: caching(*given, tokens="all", skip_first=1, early_stop=True),
    "steering last": lambda *given: steering(*given, tokens="last"),
    "patching all": lambda *given: patching(*given, tokens="all"),
    "patching last": lambda *given: patching(*given, tokens="last"),
    "addition pca": lambda *given: [x.abs() for x in addition(*given, method="pca")],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_factory_does_what_it_does_on_the_cpu(twins: Any, hooks_of: Any, case: str, dtype: torch.dtype) -> None:
    models = twins(dtype)
    with torch.no_grad():
        expected, found = (CASES[case](m, inputs(device), inputs(device, 40)) for device, m in models.items())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert len(found) == len(expected) > 0 and hooks_of(models[CUDA]) == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == (CUDA if case != "sweep" else "cpu") and a.dtype == b.dtype
        torch.testing.assert_close(a.float().cpu(), b.float(), rtol=tolerance, atol=tolerance)


def test_steering_under_gradient_checkpointing(twins: Any) -> None:
    # The backward pass runs in a thread of its own on a GPU, and computes layers again there.
    model = twins(torch.float32)[CUDA].train()
    found = []
    for again in (False, True):
        model.zero_grad()
        if again:
            model.gradient_checkpointing_enable()
        with SteeringVectors([NAME], vector=torch.ones(32), tokens="all").prepare(model) as hooked:
            hooked(**inputs()).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def table(model: nn.Module, device: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
    context = LayerScoring(LAYERS, MEASURES, rows_per_update=64, **options).prepare(model)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None), context as hooked:
        for shift in range(8):
            hooked(**inputs(device, shift * 9, texts=2))
    return context.scores().to_pandas()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_table_of_all_measures(twins: Any) -> None:
    models = twins(torch.float64)
    expected, found = (table(model, device, null=2) for device, model in models.items())
    assert len(found) == len(expected) > 300
    for column in ("score", "se", "null"):
        a, b = (torch.tensor(frame[column].to_numpy(float)) for frame in (found, expected))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_table_of_low_precision_or_autocast(twins: Any, dtype: torch.dtype) -> None:
    plain = table(twins(dtype)[CUDA], CUDA, rescale="clip")
    mixed = table(twins(torch.float32)[CUDA], CUDA, torch.bfloat16)
    assert plain["score"].notna().all() and mixed["score"].notna().all()


def test_noise_and_its_information(twins: Any) -> None:
    bounds = {}
    for device, model in twins(torch.float32).items():
        with torch.no_grad(), NoisedInformation(LAYERS, noise=1.0).prepare(model) as hooked:
            with hooked.calibrating():
                hooked(**inputs(device))
            hooked(**inputs(device))
        bounds[device] = torch.tensor(hooked.scores().to_pandas()["score"].to_numpy(float))
    # Noise is drawn on the device, so that numbers differ.
    torch.testing.assert_close(bounds[CUDA], bounds["cpu"], rtol=0.2, atol=0.2)
