"""On a GPU: probes, models that are split over devices, comparisons of checkpoints, and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe import ActivationCaching, LayerScoring, hf
from tdprobe.compare import LayerComparison, compare_layers, list_layers
from tdprobe.latent import (
    ActivationPatching,
    LinearEstimator,
    MeanDifferenceClassifier,
    ProbeManager,
    Probing,
    SteeringVectors,
    VInformationEstimator,
)
from tiny_checkpoints import ROOT, byte_llama, byte_tokenizer, save_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA, LAYERS = "cuda", r"model\.layers\.\d$"
MEASURES = ["cka", "twonn", "mutual_knn"]
TEXTS = [f"{i} is a number, and {i * i} another one" for i in range(40)]
OPTIONS: dict[str, Any] = {"batch_size": 8, "rows_per_update": 64, "progress": False}


def inputs(device: str = CUDA, shift: int = 0, texts: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(1, 128, (texts, 24), generator=torch.Generator().manual_seed(shift))
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


@pytest.mark.parametrize("kind", ["torch", "sklearn", "difference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probes(new_llama: nn.Module, kind: str, dtype: torch.dtype) -> None:
    from sklearn.linear_model import LogisticRegression

    def accuracy(found: Any, labels: Tensor) -> dict[str, float]:
        return {"accuracy": float((torch.as_tensor(found).cpu().long() == labels.cpu()).double().mean())}

    found = []
    for device in ("cpu", CUDA):
        trained = {"d_latent": 32, "num_classes": 2, "epochs": 60, "lr": 0.05, "device": device}
        made: Any = {
            "torch": (LinearEstimator, trained),
            "sklearn": (LogisticRegression, {"C": 1e4, "max_iter": 500}),
            "difference": (MeanDifferenceClassifier, {}),
        }[kind]
        manager, given = ProbeManager(*made, accuracy), inputs(device, texts=64)
        labels = (given["input_ids"][:, 10] > 64).long()
        factory = Probing(LAYERS, manager.probe_factory, additional_keys=["labels", "step_type"], tokens=10)
        with torch.no_grad(), factory.prepare(new_llama.to(device, dtype)) as hooked:
            for step in ("fit", "predict"):
                hooked(**given, labels=labels, step_type=step)
        assert manager.fit_metrics == manager.predict_metrics
        found.append([metrics["accuracy"] for metrics in manager.fit_metrics.values()])
    assert len(found[1]) == 4 and found[1] == pytest.approx(found[0], abs=0.1)


def test_usable_information_by_a_probe_on_the_gpu() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 4, generator=g), torch.arange(200) % 2
    x[:, 0] += 3 * y
    td = TensorDict({"data": x.to(CUDA), "labels": y.to(CUDA)})
    make = lambda d, k: LinearEstimator(d, num_classes=k, epochs=40, lr=0.05, device=CUDA)  # noqa: E731
    found = VInformationEstimator(probe=make)(td)["v_information"]
    assert found.device.type == CUDA and 0.2 < float(found) < 0.7


def test_a_model_that_is_split_over_devices(new_llama: nn.Module, hooks_of: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    factories = [ActivationCaching(LAYERS), ActivationCaching(LAYERS, tokens="last")]

    def cached(device: str) -> list[Tensor]:
        found = []
        for factory in factories:
            with factory.prepare(new_llama) as hooked:
                hooked(**inputs(device))
            found += [x.cpu() for x in hooked.hooking_context.cache.values()]
        return found

    with torch.no_grad():
        expected = cached("cpu")
        places: dict[str, Any] = {f"model.layers.{i}": 0 if i in (0, 2) else "cpu" for i in range(4)}
        places |= {"model.embed_tokens": "cpu", "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
        accelerate.dispatch_model(new_llama, places, main_device=0, force_hooks=True)
        for device in (CUDA, "cpu"):
            for a, b in zip(cached(device), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        context = LayerScoring(LAYERS, MEASURES).prepare(new_llama)
        with context as hooked:
            hooked(**inputs())
        with SteeringVectors(["model.layers.3"], vector=torch.ones(32), tokens="all").prepare(new_llama) as hooked:
            hooked(**inputs())
        with ActivationPatching(["model.layers.1"], tokens="last").prepare(new_llama) as hooked:
            hooked.patch(inputs(), inputs(shift=1))
    assert context.scores().to_pandas()["score"].notna().all() and list_layers(new_llama)
    assert hooks_of(new_llama) == 0


def models(device: str) -> dict[str, hf.LoadedModel]:
    made = {name: byte_llama(change=change).double().to(device) for name, change in (("base", 0.0), ("tuned", 0.05))}
    return {name: hf.LoadedModel(model, byte_tokenizer(), name, None) for name, model in made.items()}


def values(table: Any) -> Tensor:
    return torch.tensor(table.to_pandas()["score"].to_numpy(float))


@pytest.mark.parametrize("unit", [None, 2])
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_comparisons(tmp_path: Path, one_at_a_time: bool, unit: int | None) -> None:
    options = {**OPTIONS, "one_at_a_time": one_at_a_time, "unit": unit}
    expected = values(compare_layers(models("cpu"), TEXTS, LAYERS, MEASURES, **options))
    split = {**models("cpu"), "tuned": models(CUDA)["tuned"]}
    for given, more in ((models(CUDA), {}), (models(CUDA), {"parts": tmp_path / "parts"}), (split, {})):
        found = values(compare_layers(given, TEXTS, LAYERS, MEASURES, **options, **more))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_rows_that_were_saved_on_a_gpu(tmp_path: Path, device: str) -> None:
    comparison = LayerComparison({"base": models(CUDA)["base"]}, LAYERS, MEASURES, **OPTIONS, one_at_a_time=True)
    comparison.run(TEXTS)
    comparison.saved_rows().save(tmp_path / "rows")
    given = {"base": tmp_path / "rows", "tuned": models(device)["tuned"]}
    found = values(compare_layers(given, TEXTS, LAYERS, MEASURES, **OPTIONS))
    expected = values(compare_layers(models("cpu"), TEXTS, LAYERS, MEASURES, **OPTIONS, one_at_a_time=True))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_folder_that_is_loaded_to_the_gpu(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "base")
    found, expected = (
        compare_layers({"base": str(folder)}, TEXTS, LAYERS, MEASURES, **OPTIONS, device=device, dtype="float64")
        for device in (CUDA, "cpu")
    )
    torch.testing.assert_close(values(found), values(expected), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_command(tmp_path: Path) -> None:
    for module in ("typer", "altair", "vl_convert", "matplotlib"):
        pytest.importorskip(module)
    folder = save_checkpoint(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    command = [
        "-m",
        "tdprobe",
        "compare",
        folder,
        "--data",
        tmp_path / "texts.txt",
        "--out",
        tmp_path,
        "--device",
        CUDA,
    ]
    assert run(command).returncode == 0 and (tmp_path / "scores.json").is_file()


def run(command: list[Any]) -> subprocess.CompletedProcess[str]:
    # Packages may lie in a folder that only this variable names.
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, *map(str, command)]
    found = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found


WORK = """
import sys, torch, torch.distributed as dist
from tdprobe.stats import Cross, Gram, Moments, Reservoir
from test_cuda_models import MEASURES, OPTIONS, TEXTS, LAYERS, models
from tdprobe.compare import compare_layers
dist.init_process_group(sys.argv[1])
rank, world = dist.get_rank(), dist.get_world_size()
def state_of(statistic, rank):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(rank)).cuda()
    ids = torch.arange(30 * rank, 30 * rank + 30)
    return statistic.update(statistic.init([x], ids), [x], ids)
for statistic in (Gram(), Moments(), Cross(unbiased=True), Reservoir(16)):
    found, wanted = state_of(statistic, rank).sync(), state_of(statistic, 0)
    for other in range(1, world):
        wanted = wanted.merge(state_of(statistic, other))
    assert bool((found == wanted).all()), statistic
    devices = [{k: x.device for k, x in part.items(True, True)} for part in (found, wanted)]
    assert devices[0] == devices[1], devices
table = compare_layers(models("cuda"), TEXTS, LAYERS, MEASURES, **OPTIONS, unit=1, one_at_a_time=False)
print("blocks", len(table.blocks))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("backend", "world"), [("nccl", 1), ("gloo", 2)])
def test_processes(tmp_path: Path, backend: str, world: int) -> None:
    # NCCL wants a GPU for each process.
    (tmp_path / "work.py").write_text(WORK, encoding="utf-8")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world, tmp_path / "work.py", backend]
    assert run(start).stdout.count("blocks") == world
