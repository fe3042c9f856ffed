"""States of several processes: one merge, in the order of ranks, and clear words when a process is gone."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rank_tools import needs_fork, run_ranks, values
from tdprobe.errors import RankError
from tdprobe.stats import Cross, Gram, Moments, Reservoir, State, Statistic, sync

pytestmark = needs_fork


def state_of(statistic: Statistic, rank: int) -> State:
    # The last rank has no rows.
    n = (20, 33, 0)[rank]
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randn(n, d, generator=generator).bfloat16() for d in (3, 5)]
    ids = torch.arange(100 * rank, 100 * rank + n)
    return statistic.update(statistic.init(rows, ids), rows, ids)


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool((a == b).all())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_gets_the_merge_of_all(world: int) -> None:
    statistics = [Gram(), Moments(), Cross(unbiased=True), Reservoir(size=16)]
    found = values(run_ranks(world, lambda rank: [state_of(statistic, rank).sync() for statistic in statistics]))
    for place, statistic in enumerate(statistics):
        wanted = state_of(statistic, 0)
        for rank in range(1, world):
            wanted = wanted.merge(state_of(statistic, rank))
        assert int(wanted.n) == {1: 20, 2: 53, 3: 53}[world] if place < 3 else int(wanted.n) == 16
        assert all(same(states[place], wanted) for states in found)


def test_a_part_of_the_ranks_can_sync_by_themselves() -> None:
    def work(rank: int) -> int:
        groups = [dist.new_group([0, 2]), dist.new_group([1])]
        return int(state_of(Moments(), rank % 2).sync(groups[rank % 2]).n)

    assert values(run_ranks(3, work)) == [40, 33, 40]


def test_large_messages_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "PIECE", 7)

    def work(rank: int, data: bytes) -> bytes:
        if rank == 1:
            sync.send_bytes(data, 0)
            return data
        return sync.receive_bytes(1)

    for size in (0, 6, 7, 8, 50):
        data = bytes(range(size))
        assert values(run_ranks(2, work, data)) == [data, data]


def test_a_rank_that_died_is_named() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        state_of(Moments(), rank).sync(timeout=30)

    first, second = run_ranks(2, work)
    assert second.code == -signal.SIGKILL and isinstance(first.error, RankError)
    assert "rank 1 has ended before its work was done" in str(first.error)


def test_a_rank_that_is_silent_is_named_in_time() -> None:
    def work(rank: int) -> float:
        start = time.monotonic()
        if rank == 1:
            time.sleep(3)
            return 0.0
        with pytest.raises(RankError, match="rank 1 has been silent for 1 seconds.*raise the timeout"):
            state_of(Moments(), rank).sync(timeout=1)
        return time.monotonic() - start

    waited, _ = values(run_ranks(2, work))
    assert 1 <= waited < 3
