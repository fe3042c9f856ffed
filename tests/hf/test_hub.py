from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdprobe.errors import ConfigError
from tdprobe.hf import describe, load
from tdprobe.hf.hub import Source, checkpoints_in, explain, find, weights_in


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ckpt/step-0", "ckpt/step-25", "ckpt/step-400", "odd@name", "gpt2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ckpt/step-0", Source("ckpt/step-0", None, True)),
        ("./ckpt/step-0/", Source("ckpt/step-0", None, True)),
        ("odd@name", Source("odd@name", None, True)),
        ("gpt2", Source("gpt2", None, True)),
        ("gpt2-large", Source("gpt2-large", None, False)),
        ("owner/model", Source("owner/model", None, False)),
        ("owner/model@v1.0", Source("owner/model", "v1.0", False)),
        ("owner/model@refs/pr/3", Source("owner/model", "refs/pr/3", False)),
    ],
)
def test_a_name_is_a_folder_or_a_hub_id(here: Path, name: str, source: Source) -> None:
    assert find(name) == source


def test_the_home_folder_may_be_a_tilde(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert find("~/gpt2") == Source(str(here / "gpt2"), None, True)


_PART = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@given(owner=_PART, model=_PART, revision=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,20}", fullmatch=True))
def test_name_and_revision_split_and_join(owner: str, model: str, revision: str) -> None:
    source = find(f"none-such-{owner}/{model}@{revision}")
    assert (source.where, source.revision) == (f"none-such-{owner}/{model}", revision)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ckpt/step-40", "no folder 'ckpt/step-40'; did you mean 'ckpt/step-400'"),
        ("./ckpt/stepp-25", "did you mean './ckpt/step-25'"),
        ("ckpt", "3 model folders are inside: 'ckpt/step-0', 'ckpt/step-25', 'ckpt/step-400'"),
        ("nowhere/at/all", "nor its parent 'nowhere/at'"),
        (
            "notes/model",
            "no model folder lies in 'notes'; check the path. For a hub model of that name",
        ),
        ("empty", "the folder 'empty' is empty"),
        ("adapter", "holds an adapter only; merge it into its base model"),
        ("notes", "holds no config.json, so it is no model folder; it holds: todo.txt"),
        ("gpt2/config.json", "'gpt2/config.json' is a file; give the folder"),
        ("gpt2@main", "'gpt2' is a folder, which has no revisions; leave '@main' out"),
        ("owner/model@", "write 'owner/model@revision'"),
        ("@main", "write 'owner/model@revision'"),
        ("", "there is no folder ''"),
        ("two words", "there is no folder 'two words'"),
    ],
)
def test_a_wrong_name_is_explained(here: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        find(name)


def test_checkpoints_sort_by_the_value_of_their_numbers(here: Path) -> None:
    for name in ("step-100", "step-9", "final"):
        (here / "ckpt" / name).mkdir()
        (here / "ckpt" / name / "config.json").touch()
    assert checkpoints_in(here / "ckpt") == ["final", "step-0", "step-9", "step-25", "step-100", "step-400"]


def test_weights_are_summed_over_shards_and_counted_once(tmp_path: Path) -> None:
    assert weights_in(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"0" * 70)
    (tmp_path / "training_args.bin").write_bytes(b"0" * 999)
    assert weights_in(tmp_path) == 70
    for shard, size in (("model-00001-of-00002", 40), ("model-00002-of-00002", 25)):
        (tmp_path / f"{shard}.safetensors").write_bytes(b"0" * size)
    assert weights_in(tmp_path) == 65


def test_a_name_that_no_one_knows_is_compared_with_the_embedded_ones() -> None:
    said = explain("demoo", Source("demoo"), OSError("offline"))
    assert "cannot load 'demoo'" in said and "Did you mean 'demo'?" in said
    assert "Did you mean" not in explain("gpt2", Source("gpt2"), OSError("offline"))


# A child process, since huggingface_hub reads its settings once, when it is imported.
_OFFLINE = """
import json, sys
from tdprobe.errors import ConfigError
from tdprobe.hf import describe, load, weights_bytes

said = {}
for name in sys.argv[1:]:
    try:
        loaded = load(name)
        said[name] = [loaded.revision, describe(loaded.model)["fingerprint"], weights_bytes(name)]
    except ConfigError as error:
        said[name] = str(error)
said["uncached bytes"] = weights_bytes("org/unheard-of")
print(json.dumps(said))
"""


def _offline(home: Path, *names: str) -> dict:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", _OFFLINE, *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_hub_models_load_by_revision_and_unknown_ones_are_explained(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    first, second = "1" * 40, "2" * 40
    shutil.copytree(checkpoint, repository / "snapshots" / first)
    model = load(checkpoint).model
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(repository / "snapshots" / second)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(first)
    (repository / "refs" / "tuned").write_text(second)

    said = _offline(tmp_path, "org/tiny", "org/tiny@tuned", "org/unheard-of", "org/tiny@none-such")

    size = (checkpoint / "model.safetensors").stat().st_size
    assert said["org/tiny"] == [first, describe(load(checkpoint).model)["fingerprint"], size]
    assert said["org/tiny@tuned"] == [second, describe(model)["fingerprint"], size]
    assert "tried a folder of that name, then the hub model 'org/unheard-of'" in said["org/unheard-of"]
    assert "the hub model 'org/tiny' at revision 'none-such'" in said["org/tiny@none-such"]
    assert said["uncached bytes"] is None
