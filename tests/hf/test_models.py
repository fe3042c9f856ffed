from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tdprobe.errors import ConfigError
from tdprobe.hf import batches, demo_encoder_path, demo_model_path, describe, load, weights_bytes


def test_the_demo_model_knows_the_capital_of_france(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_the_demo_encoder_puts_paraphrases_close(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply."]
    batch = next(iter(batches(texts, tokenizer)))
    with torch.no_grad():
        states = model(**batch.inputs).last_hidden_state
    mask = batch.inputs["attention_mask"].unsqueeze(-1)
    means = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similar, other = (means[0] @ means[1]).item(), (means[0] @ means[2]).item()
    assert similar > 0.5 > 0.3 > other


def test_a_folder_loads_as_it_was_saved(checkpoint: Path, tiny_llama: nn.Module) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded = load(str(checkpoint))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded.model) is type(tiny_llama)
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    saved, read = tiny_llama.state_dict(), loaded.model.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[name], read[name]) for name in saved)
    assert (loaded.name, loaded.revision) == (str(checkpoint), None)
    assert loaded.tokenizer("ab")["input_ids"] == loaded.tokenizer.convert_tokens_to_ids(["a", "b"])


def test_dtype_converts_and_keeps_the_nearest_values(checkpoint: Path, tiny_llama: nn.Module) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        model = load(checkpoint, dtype=dtype, device="cpu").model
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, tiny_llama.get_parameter(name).to(torch.bfloat16))


def test_a_model_without_a_head_stays_without(tmp_path: Path, tiny_llama: Any) -> None:
    tiny_llama.model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.model) is type(tiny_llama.model)
    assert loaded.tokenizer is None
    with pytest.raises(ConfigError, match=r"no tokenizer.*tokenizer\.json"):
        batches(["a"], loaded.tokenizer)


def test_loading_prints_no_bars_and_leaves_them_on(checkpoint: Path, capfd: pytest.CaptureFixture) -> None:
    from transformers.utils import logging

    load(checkpoint)
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    assert logging.set_tqdm_hook(None) is None


def test_importing_the_room_does_not_import_transformers() -> None:
    code = "import sys, tdprobe.hf; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_code_of_a_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(checkpoint, folder)
    trace = tmp_path / "it-ran"
    (folder / "foreign.py").write_text(f"open({str(trace)!r}, 'w')\n")
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.C", "AutoModel": "foreign.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="needs Python code from its own repository, which tdprobe never runs"):
        load(folder)
    assert not trace.exists()


def test_a_folder_without_weights_is_explained(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"holds config\.json, but transformers says: .*model\.safetensors"):
        load(tmp_path)


def test_a_config_that_is_not_json_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=re.escape(f"cannot load {str(tmp_path)!r}")):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float23"}, "unknown dtype 'float23'; did you mean 'float32'"),
        ({"dtype": "nn"}, "unknown dtype 'nn'"),
        ({"device": "gpu"}, "got the device 'gpu'; write 'cpu', 'cuda'"),
        ({"device": "cuda:99"}, "got the device 'cuda:99', which this machine or this build of PyTorch does not have"),
    ],
)
def test_wrong_options_are_explained(checkpoint: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(checkpoint, **options)


@pytest.mark.parametrize("name", ["demo@main", "demo-encoder@v2"])
def test_demo_models_have_no_revisions(name: str) -> None:
    with pytest.raises(ConfigError, match=f"write '{name.split('@')[0]}'"):
        load(name)


def test_weights_bytes_is_the_size_on_disk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert weights_bytes(checkpoint) == (checkpoint / "model.safetensors").stat().st_size
    assert weights_bytes("demo") == (demo_model_path() / "model.safetensors").stat().st_size
    assert weights_bytes("demo-encoder") == (demo_encoder_path() / "model.safetensors").stat().st_size
    monkeypatch.setenv("TDPROBE_CACHE", str(tmp_path))
    assert weights_bytes("demo") is None
    assert not any(tmp_path.iterdir())


def test_describe_counts_what_the_architecture_says(checkpoint: Path) -> None:
    loaded = load(checkpoint)
    about = describe(loaded.model, loaded.tokenizer, revision="v1")
    vocabulary, width, inner, layers, kv = 128, 32, 64, 4, 16
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
    assert about["n_parameters"] == 2 * vocabulary * width + layers * layer + width
    assert (about["class"], about["model_type"], about["dtype"]) == ("LlamaForCausalLM", "llama", ["float32"])
    assert about["tokenizer"]["vocab_size"] == 256 + 2
    assert (about["config_name"], about["revision"]) == (checkpoint.name, "v1")
    assert str(checkpoint.parent) not in json.dumps(about)


def test_the_fingerprint_is_of_the_weights(checkpoint: Path, tiny_llama: nn.Module) -> None:
    model = copy.deepcopy(tiny_llama)
    same = describe(model)["fingerprint"]
    assert same == describe(load(checkpoint).model)["fingerprint"] == describe(tiny_llama)["fingerprint"]
    assert describe(copy.deepcopy(model).bfloat16())["fingerprint"] != same
    assert describe(model.model)["fingerprint"] != same
    ids = torch.arange(16).reshape(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert describe(model)["fingerprint"] != same


def test_describe_takes_any_module_and_unallocated_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 1))
    assert describe(model)["n_parameters"] == 10 * 4 + 4 + 4 * 1 + 1
    assert describe(nn.Identity())["dtype"] == []
