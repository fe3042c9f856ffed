"""Units of work: every batch once, whatever is picked, and the same numbers however the work was cut short."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tdprobe import hf
from tdprobe.compare import LayerComparison, compare_layers
from tdprobe.compare.parts import Part, PartFolder
from tdprobe.compare.units import Units, data_facts, unit_size
from tdprobe.errors import ConfigError
from tdprobe.stats import Moments
from tdprobe.tables import ScoreTable
from tiny_checkpoints import byte_llama, byte_tokenizer


class OneByOne:
    """A stream without a length, or with one but without places."""

    def __init__(self, items: Any, length: bool) -> None:
        self.items = items
        if length:
            self.__class__ = type("Sized", (OneByOne,), {"__len__": lambda self: len(self.items)})

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


kinds = st.sampled_from(["picked", "sized", "unsized"])


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), kinds)
def test_every_batch_is_in_one_unit_of_one_rank(length: int, size: int, world: int, kind: str) -> None:
    items = list(range(100, 100 + length))
    stream = items if kind == "picked" else OneByOne(items, length=kind == "sized")
    found: dict[int, list[tuple[int, Any]]] = {}
    for rank in range(world):
        units = Units([stream, stream], size)
        for unit, part in units.walk(lambda unit, rank=rank: unit % world == rank):
            assert unit not in found
            found[unit] = list(part)
        assert len(units) == (-(-length // size) if kind == "unsized" else max(1, (length + size // 2) // size))
    assert sorted(found) == list(range(len(units)))
    joined = [item for unit in sorted(found) for item in found[unit]]
    assert joined == [(n, (100 + n, 100 + n)) for n in range(length)]
    sizes = [len(found[unit]) for unit in sorted(found)]
    assert set(sizes[:-1]) <= {size} and sizes[-1] < 1.5 * size + 1
    if kind != "unsized" and len(sizes) > 1:
        assert sizes[-1] >= size / 2


def test_only_the_batches_of_the_units_that_are_wanted_are_made() -> None:
    made = []

    class Counting(list):
        def __getitem__(self, place: Any) -> Any:
            made.append(place)
            return super().__getitem__(place)

    stream = Counting(range(12))
    units = Units([stream], 3)
    assert [unit for unit, part in units.walk(lambda unit: unit in {1, 3}) if list(part)] == [1, 3]
    assert made == [3, 4, 5, 9, 10, 11] and units.n_batches(lambda unit: unit in {1, 3}) == 6


def test_text_batches_can_be_picked() -> None:
    texts = [f"text {i}" * (i % 3 + 1) for i in range(11)]
    found = hf.batches(texts, byte_tokenizer(), batch_size=4)
    for number, batch in enumerate(found):
        picked = found[number]
        assert picked.texts == batch.texts == texts[4 * number : 4 * number + 4]
        assert all(torch.equal(picked.inputs[name], tensor) for name, tensor in batch.inputs.items())
    with pytest.raises(IndexError, match="3 batches"):
        found[3]


@pytest.mark.parametrize(
    ("args", "wanted"), [((None, 512, 16), 32), ((None, 4096, 16), 256), ((None, 8, 1), 512), ((3, 8, 1), 3)]
)
def test_a_unit_fills_a_portion(args: Any, wanted: int) -> None:
    assert unit_size(*args) == wanted


@pytest.mark.parametrize("unit", [0, -1, 1.5, True])
def test_units_without_batches_are_refused(unit: Any) -> None:
    with pytest.raises(ConfigError, match="unit is a number of batches"):
        unit_size(unit, 512, 16)


def test_data_is_told_apart() -> None:
    x = torch.arange(6.0)
    lots = [
        ["a", "b"],
        ["a", "c"],
        ["ab"],
        [x],
        [x.reshape(2, 3)],
        [x.double()],
        [{"x": x}],
        [{"y": x}],
        [(x, x)],
        [x, x],
    ]
    prints = [str(data_facts(lot)) for lot in lots]
    assert len(set(prints)) == len(lots)
    assert data_facts([{"x": x.clone()}]) == data_facts([{"x": x}]) and data_facts(iter([x])) is None
    batches = hf.batches(["a", "b"], byte_tokenizer())
    assert data_facts(batches)["fingerprint"] == data_facts(["a", "b"])["fingerprint"]


# Comparisons in units.


def mlp(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))


def pictures(n: int = 60) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


def comparison(models: Any, **options: Any) -> LayerComparison:
    options = {"progress": False, "rows_per_update": 16, "unit": 2, "max_norm": 2.0, **options}
    return LayerComparison(models, r"\d", ["cka", "twonn"], **options)


BOTH = pytest.mark.parametrize("one_at_a_time", [False, True])


def test_rows_of_two_units_never_share_a_portion() -> None:
    x = pictures(48)
    table = compare_layers(mlp(), x.split(8), r"\d", rows_per_update=16, unit=3, max_norm=None, progress=False)
    # Portions of 16 and 8 rows, unit by unit: the weighted sums of two streams of 24 rows each.
    products = torch.zeros(3, 3, dtype=torch.float64)
    from tdprobe.stats import gram_products

    with torch.no_grad():
        for half in x.split(24):
            for part in half.split([16, 8]):
                rows = [mlp()[: i + 1](part) for i in range(3)]
                products += len(part) * gram_products(rows)
    wanted = products / (products.diag().sqrt().outer(products.diag().sqrt()))
    np.testing.assert_allclose(table.matrix("cka"), wanted, atol=1e-9)


@BOTH
def test_what_an_interrupt_left_goes_on_from_its_parts(one_at_a_time: bool, tmp_path: Path) -> None:
    models, x = {"a": mlp(0), "b": mlp(1)}, pictures().split(5)
    wanted = comparison(models, one_at_a_time=one_at_a_time)
    wanted.run(x)
    calls = {"n": 0, "stop": 5}

    def count(*_: Any) -> None:
        calls["n"] += 1
        if calls["n"] > calls["stop"]:
            raise KeyboardInterrupt

    handle = models["a"].register_forward_pre_hook(count)
    first = comparison(models, one_at_a_time=one_at_a_time, parts=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        first.run(x)
    kept = sorted(path.name for path in (tmp_path / "parts").rglob("*.safetensors"))
    assert kept == ["part-000000.safetensors", "part-000001.safetensors"]
    calls["stop"] = 100
    second = comparison(models, one_at_a_time=one_at_a_time, parts=tmp_path / "parts")
    second.run(x)
    handle.remove()
    # Of 12 batches, 4 were in finished units.
    assert calls["n"] == 6 + 8
    assert second.scores().blocks == wanted.scores().blocks and second.n_rows == 60
    assert str(tmp_path / "parts") in second.kept
    second.finish()
    assert not list(tmp_path.iterdir())


def test_finishing_leaves_what_is_not_ours(tmp_path: Path) -> None:
    found = comparison(mlp(), parts=tmp_path / "parts")
    found.run(pictures().split(10))
    (tmp_path / "parts" / "notes.txt").write_text("mine", encoding="utf-8")
    found.finish()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["notes.txt"]


def test_a_damaged_part_is_computed_again(tmp_path: Path) -> None:
    model, x = mlp(), pictures().split(10)
    first = comparison(model, parts=tmp_path)
    first.run(x)
    path = tmp_path / "part-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    second = comparison(model, parts=tmp_path)
    with pytest.warns(UserWarning, match=r"part-000001\.safetensors' is damaged.*the unit is computed again"):
        second.run(x)
    assert second.scores().blocks == first.scores().blocks


@BOTH
@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"unit": 3}, "unit=2; this one has unit=3"),
        ({"skip_first": 2}, "skip_first=1; this one has skip_first=2"),
        ({"models": {"a": mlp(5)}}, "checkpoints.a.fingerprint="),
        ({"batches": pictures(50).split(10)}, "data.batches=6; this one has data.batches=5"),
        ({"batches": (pictures() + 1).split(10)}, "data.fingerprint="),
    ],
)
def test_parts_of_another_run_are_refused(one_at_a_time: bool, changed: Any, field: str, tmp_path: Path) -> None:
    def run(models: Any, batches: Any, **options: Any) -> None:
        comparison(models, parts=tmp_path, one_at_a_time=one_at_a_time, **options).run(batches)

    given = {"models": {"a": mlp()}, "batches": pictures().split(10)}
    run(**given)
    with pytest.raises(ConfigError, match=f"holds parts of another run, with {field}"):
        run(**{**given, **changed})


def test_sums_of_other_estimators_are_refused_and_samples_of_them_are_not(tmp_path: Path) -> None:
    x = pictures().split(10)
    for one_at_a_time in (False, True):
        options = {"progress": False, "parts": tmp_path / str(one_at_a_time), "one_at_a_time": one_at_a_time}
        LayerComparison(mlp(), r"\d", **options).run(x)
        again = LayerComparison(mlp(), r"\d", ["cka", "twonn"], **options)
        if one_at_a_time:
            again.run(x)
            assert again.scores().estimators == ("cka", "twonn")
        else:
            with pytest.raises(ConfigError, match=r"with estimators\.twonn=None; this one has estimators\.twonn="):
                again.run(x)


def test_units_with_hardly_a_row_are_counted_as_left_out(tmp_path: Path) -> None:
    loaded = hf.LoadedModel(byte_llama(), byte_tokenizer(), "a", None)
    texts = [*(f"a line of letters {i}" for i in range(6)), "xy"]
    options = {"batch_size": 1, "progress": False, "max_norm": None}
    # Batches that come one by one do not tell that the last unit will be short.
    batches = OneByOne(hf.batches(texts, loaded.tokenizer, batch_size=1), length=False)
    table = compare_layers(loaded, batches, unit=3, parts=tmp_path, **options)
    rows = sum(len(text) - 1 for text in texts)
    assert table.meta["rows"] == rows and table.meta["outliers"] == 1 and table.block("cka").n == rows - 1


def test_parts_merge_like_states() -> None:
    def part(n: int) -> Part:
        x = torch.arange(n * 2.0).reshape(n, 2)
        return Part(
            {"h": 2},
            {"rows": n},
            ((Moments().update(Moments().init([x], torch.arange(n)), [x], torch.arange(n)), None),),
        )

    joined = Part().merge(part(3)).merge(Part(counts={"rows": 1})).merge(part(5))
    assert joined.counts == {"rows": 9} and joined.states[0][0].n == 8 and joined.states[0][1] is None
    with pytest.raises(ConfigError, match="'h' had width 2 and then 3"):
        part(2).merge(Part({"h": 3}))
    with pytest.raises(ConfigError, match="'g' had width None and then 3"):
        part(2).merge(Part({"h": 2, "g": 3}))


def test_a_data_loader_is_walked_once_per_run() -> None:
    loader = DataLoader(pictures(), batch_size=10)
    table = compare_layers(mlp(), loader, r"\d", unit=2, progress=False)
    assert isinstance(table, ScoreTable) and table.block("cka").n == 60


def test_parts_of_samples_hold_only_what_may_still_count(tmp_path: Path) -> None:
    x, size = pictures(600).split(10), 50
    options = {"one_at_a_time": True, "bank_size": size, "unit": 10, "progress": False}
    comparison = LayerComparison(mlp(), r"\d", parts=tmp_path, **options)
    comparison.run(x)
    folder = tmp_path / "checkpoint-0"
    parts = PartFolder(folder, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    seen, counts = torch.zeros(0, dtype=torch.int64), []
    for unit in range(6):
        ids = parts.read(unit).states[0][0].ids
        first = LayerComparison(mlp(), r"\d", **options)
        first.run(x[: 10 * unit + 10])
        lowest = first.saved_rows().state.ids
        # Of the rows up to here the sample holds those of this unit that are in the part, and older ones.
        assert set(ids.tolist()) == set(lowest.tolist()) - set(seen.tolist())
        seen = torch.cat([seen, ids])
        counts.append(len(ids))
    assert counts[0] == size and sum(counts) < 3 * size
    assert torch.equal(comparison.saved_rows().state.ids, lowest) and int(comparison.saved_rows().state.n_seen) == 600
