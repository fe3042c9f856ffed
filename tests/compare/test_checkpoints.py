"""Checkpoints: what may be one, when it is loaded, how much memory it asks for, what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tdprobe import hf
from tdprobe.compare import checkpoints as module
from tdprobe.compare.checkpoints import Checkpoint, as_checkpoints, evaluating, free_bytes, need_one_at_a_time
from tdprobe.errors import ConfigError
from tiny_checkpoints import byte_llama, save_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return [save_checkpoint(root / f"step-{seed}", seed=seed) for seed in range(2)]


def checkpoints(*sources: Any, **options: Any) -> list[Checkpoint]:
    named = {f"c{place}": source for place, source in enumerate(sources)}
    return as_checkpoints(named, **{"dtype": None, "device": None, **options})


def test_a_single_model_is_called_model() -> None:
    (only,) = as_checkpoints(nn.Linear(2, 2), dtype=None, device=None)
    assert only.name == "model" and only.is_loaded


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ({}, "there is no checkpoint to compare"),
        ({"a": 3}, "checkpoint 'a' is a int; give a model, a folder, 'name@revision', or a file of saved rows"),
        ({"a": nn.Linear(2, 2), "b": None}, "checkpoint 'b' is a NoneType"),
        ([nn.Linear(2, 2)], "checkpoint 'model' is a list"),
        ({"a": nn.Linear}, "checkpoint 'a' is a type"),
        ({1: nn.Linear(2, 2)}, "named by strings, got 1"),
        ({"": nn.Linear(2, 2)}, "named by strings, got ''"),
    ],
)
def test_what_is_no_checkpoint_is_refused(models: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        as_checkpoints(models, dtype=None, device=None)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_loaded_in_eval_mode_with_its_tokenizer(folders: list[Path], kind: Any) -> None:
    (found,) = checkpoints(kind(folders[0]), dtype="float64", device="cpu")
    assert not found.is_loaded
    with found.loaded() as loaded:
        assert not loaded.model.training and loaded.model.dtype == torch.float64
        assert loaded.tokenizer("ab")["input_ids"] != loaded.tokenizer("ba")["input_ids"]
        same = byte_llama(seed=0).state_dict()
        assert all(torch.equal(value.float(), same[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_every_module_gets_its_own_mode_back(error: type[BaseException] | None) -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Linear(2, 2)).train()
    model[1].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    assert set(modes.values()) == {True, False}
    try:
        with checkpoints(model)[0].loaded() as loaded:
            assert loaded.model is model and not any(part.training for part in model.modules())
            if error is not None:
                raise error
    except BaseException as raised:
        assert type(raised) is error
    assert {name: part.training for name, part in model.named_modules()} == modes


def test_evaluating_restores_modes_even_where_eval_fails() -> None:
    class Stubborn(nn.Linear):
        def eval(self) -> nn.Module:
            self.training = False
            raise RuntimeError("no")

    model = Stubborn(1, 1)
    with pytest.raises(RuntimeError, match="no"), evaluating(model):
        pass
    assert model.training


def test_a_loaded_model_is_taken_as_it_is() -> None:
    given = hf.LoadedModel(nn.Linear(2, 2).train(), object(), "name", "abc123")
    with checkpoints(given)[0].loaded() as loaded:
        assert loaded is given and not given.model.training
    assert given.model.training


def test_the_size_of_what_is_still_to_load(folders: list[Path]) -> None:
    parameters = sum(p.numel() for p in byte_llama().parameters())
    sizes = [found.n_bytes() for found in checkpoints(str(folders[0]), nn.Linear(9, 9))]
    assert 4 * parameters <= sizes[0] < 4 * parameters + 10_000 and sizes[1] == 0


@pytest.mark.parametrize(("share", "needed"), [(1.9, True), (2.1, False)])
def test_one_at_a_time_where_half_of_the_free_memory_would_not_do(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, share: float, needed: bool
) -> None:
    found = checkpoints(*map(str, folders))
    total = sum(one.n_bytes() for one in found)
    monkeypatch.setattr(module, "free_bytes", lambda device: int(share * total))
    assert need_one_at_a_time(found) is needed


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_in_memory_already_gains_nothing_from_turns(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda device: 1)
    sources: list[Any] = [nn.Linear(2, 2), str(folders[0])]
    assert not need_one_at_a_time(checkpoints(*sources[:: 1 - 2 * place]))
    assert need_one_at_a_time(checkpoints(*sources, str(folders[1])))


def test_free_memory_is_read_or_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes("cpu") > 2**20
    # A wrong device is for loading to complain about, with its allowed names.
    assert free_bytes("gpu") > 2**20 and free_bytes(torch.device("cpu")) > 2**20

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert free_bytes(None) == 8 * 2**30


def test_a_folder_that_does_not_exist_is_found_out_before_anything_is_loaded(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="step-00.*did you mean .*step-0"):
        need_one_at_a_time(checkpoints(str(folders[0]), f"{folders[0]}0"))
