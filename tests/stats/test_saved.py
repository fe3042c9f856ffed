"""States in files: what comes back is what was saved, and what was changed is refused."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.stats import (
    Cross,
    Gram,
    Moments,
    Reservoir,
    State,
    Statistic,
    files,
    load_state,
    read_state,
    save_state,
)


class LettersState(State):
    """A state of another package: tensors, a nested tensordict, a nested state, text, and nothing."""

    count: Tensor
    table: TensorDict
    inner: Any
    title: str = "letters"
    missing: Tensor | None = None

    @property
    def n(self) -> Tensor:
        return self.count


@dataclass(frozen=True)
class Letters(Statistic):
    name: ClassVar[str] = "letters"
    alphabet: tuple[str, ...] = ("a", "b")

    def init(self, rows: Any, ids: Tensor) -> LettersState:
        inner = Moments().init(rows, ids)
        table = TensorDict({"a/b": torch.ones(2), "a": {"b": torch.zeros(1), "~1": ids[:0]}})
        return LettersState(count=torch.tensor(0), table=table, inner=inner)

    def update(self, state: Any, rows: Any, ids: Tensor) -> LettersState:
        inner = Moments().update(state.inner, rows, ids)
        return LettersState(count=state.count + len(ids), table=state.table, inner=inner, title="seen")


STATISTICS = [Gram(), Gram(unbiased=False), Moments(), Cross(), Cross(unbiased=True), Reservoir(size=12), Letters()]
each = pytest.mark.parametrize("statistic", STATISTICS, ids=repr)


def rows_of(n: int, lead: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    found = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, n, d, generator=found).to(dtype) for d in (3, 1)]


def state_of(statistic: Statistic, rows: list[Tensor], start: int = 0) -> State:
    ids = torch.arange(start, start + rows[0].shape[-2])
    return statistic.update(statistic.init(rows, ids), rows, ids)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return every value in a state, with type, size and dtype, by its path."""
    if isinstance(value, State):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, TensorDictBase):
        parts = dict(value.items())
    elif isinstance(value, Tensor):
        return {name: (tuple(value.shape), value.dtype, value.reshape(-1).view(torch.uint8).tolist())}
    else:
        return {name: value}
    found = {name: (type(value), tuple(value.batch_size))}
    for key, part in parts.items():
        found |= leaves(part, f"{name}|{key}")
    return found


# What comes back.


@each
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("n", [0, 9, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_comes_back_is_what_was_saved_bit_by_bit(
    statistic: Statistic, lead: tuple[int, ...], n: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = state_of(statistic, rows_of(n, lead, dtype))
    state.save(tmp_path / "a.state", statistic=statistic)
    again = load_state(tmp_path / "a.state", statistic)
    assert leaves(again) == leaves(state) and len(leaves(state)) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


@each
def test_a_stream_goes_on_from_a_file_as_if_it_had_never_stopped(statistic: Statistic, tmp_path: Path) -> None:
    first, second = rows_of(20, seed=1), rows_of(25, seed=2)
    state = state_of(statistic, first)
    save_state(tmp_path / "half", state)
    ids = torch.arange(20, 45)
    resumed = statistic.update(load_state(tmp_path / "half"), second, ids)
    assert leaves(resumed) == leaves(statistic.update(state, second, ids))
    if not isinstance(statistic, Letters):
        other = state_of(statistic, second, start=20)
        assert leaves(load_state(tmp_path / "half").merge(other)) == leaves(state.merge(other))


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(st.text(max_size=5).filter(lambda key: key not in {"batch_size", "device"}), st.integers(0, 3)),
    st.integers(0, 2**31),
)
def test_tensordicts_with_any_keys_come_back(tmp_path_factory: pytest.TempPathFactory, sizes: Any, seed: int) -> None:
    keys = [key for key in sizes if key]
    generator = torch.Generator().manual_seed(seed)
    table = TensorDict({key: torch.randn(sizes[key], 2, generator=generator) for key in keys})
    nested = TensorDict({**{key: table.clone() for key in keys}, "none": TensorDict()})
    state = LettersState(count=torch.tensor(1), table=nested, inner=Gram().init(rows_of(1), torch.arange(1)))
    path = tmp_path_factory.mktemp("any") / "state"
    state.save(path)
    assert leaves(load_state(path)) == leaves(state)


def test_parts_of_one_memory_are_saved_one_by_one(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    table = TensorDict({"rows": whole[1:], "turned": whole.T, "same": whole[1:], "one": whole[:1].expand(3, 4)})
    state = LettersState(count=torch.tensor(1), table=table, inner=Gram().init([whole], torch.arange(3)))
    state.save(tmp_path / "state")
    assert leaves(load_state(tmp_path / "state").table) == leaves(table)


def test_layer_names_and_notes_come_back(tmp_path: Path) -> None:
    state = state_of(Moments(), rows_of(5))
    state.save(tmp_path / "a", statistic=Moments(), layers=("h.0", "h.ü"), meta={"model": "base", "tokens": ["all", 1]})
    found = read_state(tmp_path / "a")
    assert found.layers == ("h.0", "h.ü") and found.meta == {"model": "base", "tokens": ["all", 1]}
    assert found.statistic["class"] == "tdprobe.stats.moments.Moments"
    # Other tools read the file too.
    with safe_open(tmp_path / "a", framework="pt") as handle:
        header = json.loads(handle.metadata()["tdprobe"])
        assert torch.equal(handle.get_tensor("mu/0"), state.mu["0"])
    assert (header["format"], header["version"], header["layers"]) == ("tdprobe.state", 1, ["h.0", "h.ü"])


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    digests = set()
    (tmp_path / "usual").touch()
    for name in "ab":
        state_of(Reservoir(size=5), rows_of(9)).save(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
        assert (tmp_path / name).stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert len(digests) == 1


def test_bytes_hold_what_files_hold(tmp_path: Path) -> None:
    tensors, header = {"x": torch.arange(3.0).bfloat16(), "none": torch.zeros(0, 2)}, {"a": [1, "ü"]}
    files.write(tmp_path / "a", "test.kind", tensors, header)
    packed = files.pack("test.kind", tensors, header)
    assert packed == (tmp_path / "a").read_bytes()
    for found, about in (files.unpack(packed, "test.kind", "them"), files.read(tmp_path / "a", "test.kind", "it")):
        assert about["a"] == [1, "ü"] and found.keys() == tensors.keys()
        assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in tensors.items())
    with pytest.raises(ConfigError, match="rank 1 is damaged"):
        files.unpack(packed[:-1] + bytes([packed[-1] ^ 1]), "test.kind", "rank 1")
    with pytest.raises(ConfigError, match="rank 1 cannot be read"):
        files.unpack(packed[:-1], "test.kind", "rank 1")


# What is refused.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "bank.state"
    state_of(Reservoir(size=4), rows_of(6, dtype=torch.bfloat16)).save(
        path, statistic=Reservoir(size=4), layers=("é", "b")
    )
    return path


def test_no_flipped_bit_passes(saved: Path, tmp_path: Path) -> None:
    data, path = saved.read_bytes(), tmp_path / "flipped.state"
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ConfigError, match=r"flipped\.state"):
            load_state(path)


def test_no_part_of_a_file_passes(saved: Path, tmp_path: Path) -> None:
    data, path = saved.read_bytes(), tmp_path / "short.state"
    for size in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ConfigError, match=r"short\.state"):
            load_state(path)


@pytest.mark.parametrize(
    ("kind", "version", "problem"),
    [
        ("tdprobe.rows", 1, r"holds 'tdprobe\.rows', not 'tdprobe\.state'; give a file that State\.save wrote"),
        ("tdprobe.state", 2, r"has format version 2, this tdprobe reads version 1; read it with the tdprobe that"),
    ],
)
def test_other_kinds_and_versions_are_named(
    kind: str, version: int, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "VERSION", version)
    files.write(tmp_path / "other", kind, {}, {})
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=problem):
        load_state(tmp_path / "other")


def test_files_of_others_are_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"weights\.safetensors' is a safetensors file, but not of tdprobe"):
        load_state(tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"text' cannot be read .* not a file that State\.save wrote"):
        load_state(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"there is no file .*nothing'"):
        load_state(tmp_path / "nothing")


def test_another_statistic_is_named_field_by_field(saved: Path, tmp_path: Path) -> None:
    assert load_state(saved, Reservoir(size=4)).capacity == 4
    with pytest.raises(ConfigError, match=r"saved with size=4, and size=5 is wanted"):
        load_state(saved, Reservoir(size=5))
    with pytest.raises(ConfigError, match=r"saved with class='tdprobe\.stats\.reservoir\.Reservoir', and class="):
        load_state(saved, Gram())
    state_of(Gram(), rows_of(6)).save(tmp_path / "silent")
    with pytest.raises(ConfigError, match="does not say of which statistic"):
        load_state(tmp_path / "silent", Gram())


def test_a_class_is_never_imported_because_a_file_says_so(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from tdprobe.stats import State\n"
        "class Mine(State):\n    a: torch.Tensor\n"
        "Mine.__module__ = 'antigravity'\n"
        "Mine(a=torch.ones(2)).save(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(ConfigError, match=r"class 'antigravity\.Mine', which is not loaded; import the module"):
        load_state(tmp_path / "a")
    assert "antigravity" not in sys.modules


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    state = state_of(Moments(), rows_of(5))
    with pytest.raises(ConfigError, match=r"meta does not fit into JSON"):
        state.save(tmp_path / "a", meta={"x": {1, 2}})
    with pytest.raises(ConfigError, match=r"cannot write .*deep/a'.*create the folder first"):
        state.save(tmp_path / "deep" / "a")
    with pytest.raises(ConfigError, match=r"it is a folder"):
        state.save(tmp_path)
    odd = LettersState(count=torch.tensor(1), table=TensorDict(), inner=re.compile("x"))
    with pytest.raises(ConfigError, match=r"field 'inner' of the state holds a Pattern"):
        odd.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(saved.read_bytes())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        state_of(Moments(), rows_of(5)).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and path.read_bytes() == saved.read_bytes()
