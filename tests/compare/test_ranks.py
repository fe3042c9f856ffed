"""Several processes: the numbers of one, whatever they share, and finished work that outlives a process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rank_tools import needs_fork, run_ranks, values
from tdprobe import hf
from tdprobe.compare import LayerComparison, compare_layers
from tdprobe.compare.parts import PartFolder
from tdprobe.compare.ranks import Ranks
from tdprobe.errors import ConfigError, RankError, StateError
from tdprobe.tables import ScoreTable
from tiny_checkpoints import byte_llama, byte_tokenizer

pytestmark = needs_fork

BLOCKS = r"model\.layers\.\d$"
TEXTS = [f"{'abcdefgh'[i % 8] * (i % 5)}{i} is a number of {i * i + 3} letters" for i in range(35)]
BOTH = pytest.mark.parametrize("one_at_a_time", [False, True], ids=["together", "in turns"])
# 9 batches in 5 units, which no number of ranks divides evenly.
OPTIONS = {"batch_size": 4, "unit": 2, "rows_per_update": 64, "bank_size": 300, "progress": False}


@pytest.fixture(scope="module")
def models() -> dict[str, hf.LoadedModel]:
    changes = {"base": 0.0, "tuned": 0.05}
    return {n: hf.LoadedModel(byte_llama(change=c), byte_tokenizer(), n, None) for n, c in changes.items()}


def compare(models: Any, texts: Any = TEXTS, **options: Any) -> ScoreTable:
    return compare_layers(models, texts, BLOCKS, ["cka", "twonn"], **{**OPTIONS, **options})


def without_date(table: ScoreTable) -> dict[str, Any]:
    return {key: value for key, value in table.meta.items() if key != "date"}


# The same numbers.


@BOTH
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_numbers_of_one(models: Any, one_at_a_time: bool, world: int) -> None:
    alone = compare(models, one_at_a_time=one_at_a_time)
    tables = values(run_ranks(world, lambda rank: compare(models, one_at_a_time=one_at_a_time)))
    assert len(alone) == 33 and {block.n for block in alone.blocks} != {0}
    for table in tables:
        assert table.blocks == alone.blocks and without_date(table) == without_date(alone)


@BOTH
def test_processes_without_any_unit_take_part(models: Any, one_at_a_time: bool) -> None:
    options = {"one_at_a_time": one_at_a_time, "unit": 7}
    alone = compare(models, **options)
    assert all(table.blocks == alone.blocks for table in values(run_ranks(3, lambda rank: compare(models, **options))))


def test_samples_are_the_same_bit_by_bit(models: Any) -> None:
    def sampled(rank: int) -> Any:
        comparison = LayerComparison(models, BLOCKS, one_at_a_time=True, **OPTIONS)
        comparison.run(TEXTS)
        return comparison.saved_rows("tuned").state if rank == 0 else None

    alone = sampled(0)
    assert len(alone.ids) == 300 < int(alone.n_seen)
    for world in (2, 3):
        shared = values(run_ranks(world, sampled))[0]
        assert bool((shared == alone).all()) and torch.equal(shared.ids, alone.ids)


def test_a_generator_is_shared_too(models: Any) -> None:
    def batches() -> Iterator[Tensor]:
        for seed in range(9):
            yield torch.randint(2, 258, (3, 8), generator=torch.Generator().manual_seed(seed))

    alone = compare(models, batches())
    assert all(t.blocks == alone.blocks for t in values(run_ranks(2, lambda rank: compare(models, batches()))))


def test_a_model_with_30_layers(smollm2: tuple[nn.Module, Any]) -> None:
    model = {"smollm2": hf.LoadedModel(*smollm2, "smollm2", None)}
    texts = [row["text"][:60] for row in hf.demo_corpus()[:24]]
    options = {"layers": r"model\.layers\.\d+$", "batch_size": 4, "unit": 1, "rows_per_update": 32, "progress": False}
    alone = compare_layers(model, texts, **options)
    table, _ = values(run_ranks(2, lambda rank: compare_layers(model, texts, **options), limit=200))
    assert table.matrix("cka").shape == (30, 30) and table.block("cka").n == alone.block("cka").n > 200
    np.testing.assert_array_equal(table.matrix("cka"), alone.matrix("cka"))


def test_a_process_group_can_be_left_alone(models: Any) -> None:
    def work(rank: int) -> ScoreTable | None:
        # Only one process calls, as one does to log from a training run.
        return compare(models, distributed=False) if rank == 1 else None

    assert values(run_ranks(2, work))[1].blocks == compare(models).blocks


def test_scores_are_on_the_first_rank(models: Any) -> None:
    def work(rank: int) -> int:
        comparison = LayerComparison(models, BLOCKS, **OPTIONS)
        comparison.run(TEXTS)
        if rank == 1:
            with pytest.raises(StateError, match="this is rank 1, and what all have run is on rank 0"):
                comparison.scores()
            return 0
        return len(comparison.scores())

    assert values(run_ranks(2, work)) == [27, 0]


# What goes wrong.


def dying_after(parts: int, rank: int) -> Callable[[int], None]:
    """Make a rank kill itself when it has written some parts."""
    write, written = PartFolder.write, []

    def dying(self: PartFolder, unit: int, part: Any) -> None:
        write(self, unit, part)
        written.append(unit)
        if len(written) == parts:
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(own: int) -> None:
        if own == rank:
            PartFolder.write = dying

    return arm


@BOTH
@pytest.mark.parametrize("victim", [0, 1])
def test_what_was_finished_outlives_a_process_that_died(
    models: Any, one_at_a_time: bool, victim: int, tmp_path: Path
) -> None:
    alone = compare(models, one_at_a_time=one_at_a_time)
    arm, options = dying_after(1, victim), {"one_at_a_time": one_at_a_time, "parts": tmp_path / "parts"}

    def work(rank: int) -> ScoreTable:
        arm(rank)
        return compare(models, **options)

    outcomes = run_ranks(2, work)
    assert outcomes[victim].code == -signal.SIGKILL
    error = outcomes[1 - victim].error
    assert isinstance(error, RankError), error
    assert f"rank {victim} has ended before its work was done" in str(error)
    assert f"finished units are in '{tmp_path / 'parts'}': the same run goes on from there" in str(error)
    kept = {int(path.stem.removeprefix("part-")) for path in (tmp_path / "parts").rglob("*.safetensors")}
    # The victim's first unit, and all of those of the other one.
    assert kept == ({0, 1, 3} if victim == 0 else {0, 1, 2, 4})
    calls = [0]
    handle = models["base"].model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def resumed(rank: int) -> tuple[ScoreTable, int]:
        return compare(models, **options), calls[0]

    # Three finish what two began.
    found = values(run_ranks(3, resumed))
    handle.remove()
    assert all(table.blocks == alone.blocks for table, _ in found)
    # Two batches a unit, one in the last.
    assert sum(count for _, count in found) == 9 - 2 * len(kept) + (4 in kept)
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_silent_is_not_waited_for_forever(models: Any, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            time.sleep(4)
            return
        with pytest.raises(RankError, match=r"rank 1 has been silent for 1 seconds.*finished units are in"):
            compare(models, timeout=1, parts=tmp_path)

    values(run_ranks(2, work))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"skip_first": 2}, "rank 0 has skip_first=1 and rank 1 has skip_first=2"),
        ({"texts": TEXTS[:30]}, "rank 0 has data.texts=35 and rank 1 has data.texts=30"),
        ({"max_norm": 9.0}, "rank 0 has max_norm=4.0 and rank 1 has max_norm=9.0"),
    ],
)
def test_processes_that_disagree_are_told_all_of_them(models: Any, change: dict[str, Any], field: str) -> None:
    outcomes = run_ranks(3, lambda rank: compare(models, **(change if rank == 1 else {})))
    assert all(isinstance(outcome.error, ConfigError) and field in str(outcome.error) for outcome in outcomes)


def test_generators_of_other_lengths_are_found_out(models: Any) -> None:
    def work(rank: int) -> ScoreTable:
        return compare(models, (torch.full((3, 8), 5) for _ in range(9 - 4 * rank)))

    for outcome in run_ranks(2, work):
        assert "rank 0 has units=5 and rank 1 has units=3" in str(outcome.error)


def test_without_a_group_there_is_one_process() -> None:
    assert Ranks.here() == Ranks(0, 1)
    with pytest.raises(ConfigError, match="distributed=True needs a process group.*torchrun"):
        LayerComparison(nn.Linear(2, 2), distributed=True)
    with pytest.raises(ConfigError, match="timeout counts seconds"):
        LayerComparison(nn.Linear(2, 2), timeout=0)
