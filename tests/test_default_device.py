"""What is made on the way is made where the rows are, or on the CPU, whatever the default device is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from estimator_rows import ROWS
from tdprobe import ActivationCaching, LayerScoring, hf, registry
from tdprobe.compare import compare_layers
from tdprobe.latent import ActivationPatching, LinearEstimator, MaxActivating, SteeringVectors
from test_estimator_contract import batch_of, rows, streaming, targets
from tiny_checkpoints import byte_llama, byte_tokenizer

LAYERS = r"model\.layers\.\d$"


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Make tensors on a device that holds no values, as long as nobody says otherwise."""
    with torch.device("meta"):
        yield


def inputs() -> dict[str, Tensor]:
    ids = (torch.arange(48, device="cpu").view(2, 24) * 31) % 126 + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", [name for name in registry.names() if name in ROWS])
def test_every_estimator(name: str) -> None:
    estimator = streaming(name)
    batch = batch_of(estimator, rows(), targets(name) if estimator.target_keys else None)
    expected = estimator.score(estimator.update(estimator.init(batch), batch))["score"]
    with torch.device("meta"):
        state = estimator.update(estimator.init(batch), batch.select(slice(0, 40)))
        found = estimator.score(estimator.update(state, batch.select(slice(40, 60))))["score"]
    assert found.device.type == "cpu" and found.shape == expected.shape
    if name != "cka":  # minibatches
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tokens", ["all", "last"])
def test_contexts(new_llama: nn.Module, elsewhere: None, tokens: str) -> None:
    plain = {"input_ids": inputs()["input_ids"]}
    with torch.no_grad():
        for given in (inputs(), plain):
            with ActivationCaching(LAYERS, tokens=tokens).prepare(new_llama) as hooked:
                hooked(**given)
            with MaxActivating(LAYERS, tokens=tokens).prepare(new_llama) as hooked:
                hooked(**given)
            with SteeringVectors(["model.layers.1"], vector=torch.ones(32, device="cpu"), tokens=tokens).prepare(
                new_llama
            ) as hooked:
                hooked(**given)
            with ActivationPatching(["model.layers.1"], tokens=tokens).prepare(new_llama) as hooked:
                hooked.patch(given, given)
                found = hooked.sweep(given, given, lambda out: out.logits[:, -1, 0])
                assert found.device.type == "cpu" and not found.isnan().all()
            with LayerScoring(LAYERS, ["cka", "dime", "twonn"], tokens="all", null=2).prepare(new_llama) as hooked:
                hooked(**given)
            assert len(hooked.scores().blocks) == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_comparisons(one_at_a_time: bool) -> None:
    models = {n: hf.LoadedModel(byte_llama(change=c), byte_tokenizer(), n, None) for n, c in (("a", 0), ("b", 0.1))}
    texts = list(
        hf.batches([f"{i} is a number, and {i * i} another one" for i in range(12)], byte_tokenizer(), batch_size=4)
    )
    options = {"unit": 1, "rows_per_update": 64, "progress": False, "one_at_a_time": one_at_a_time}
    expected = compare_layers(models, texts, LAYERS, ["cka", "twonn"], **options)
    with torch.device("meta"):
        assert compare_layers(models, texts, LAYERS, ["cka", "twonn"], **options).blocks == expected.blocks


def test_probes_leave_rows_where_they_are() -> None:
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    estimator = LinearEstimator(3, num_classes=2, epochs=1)
    with torch.device("meta"):
        assert estimator._cast(x).device.type == "cpu" and estimator._targets(y).device.type == "cpu"
