"""Several processes for a test: forks of it, so that nothing has to be imported again."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


class Outcome(NamedTuple):
    """What became of one process.

    Attributes:
        value: What its function returned.
        error: The exception that it raised.
        code: Exit code; -9 where it was killed.
    """

    value: Any
    error: Exception | None
    code: int | None


def run_ranks(world: int, function: Callable[..., Any], *args: Any, limit: float = 60) -> list[Outcome]:
    """Call ``function(rank, *args)`` in processes of one gloo group; kill what is left after ``limit`` seconds."""
    context = multiprocessing.get_context("fork")
    with TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_work, args=(rank, world, Path(folder) / "store", pipes[rank][1], function, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for _, end in pipes:
            end.close()
        deadline = time.monotonic() + limit
        outcomes = [_outcome(process, pipe, deadline) for process, (pipe, _) in zip(processes, pipes, strict=True)]
    return outcomes


def values(outcomes: list[Outcome]) -> list[Any]:
    """Return what each process returned; raise what one of them raised."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes)
    return [outcome.value for outcome in outcomes]


def _outcome(process: Any, pipe: Any, deadline: float) -> Outcome:
    value, error = None, None
    try:
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            # Tensors that are sent as such would live in memory that ends with the process.
            value, error = pickle.loads(pipe.recv_bytes())  # noqa: S301
        process.join(max(0.0, deadline - time.monotonic()))
    except EOFError:
        process.join(10)
    finally:
        if process.is_alive():
            process.kill()
            process.join(10)
    return Outcome(value, error, process.exitcode)


def _work(rank: int, world: int, store: Path, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    value, error = None, None
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        # Whoever dies in the function dies after all have met.
        dist.barrier()
        value = function(rank, *args)
    except Exception as found:
        traceback.print_exc()
        error = found
    pipe.send_bytes(pickle.dumps((value, error)))
    pipe.close()
    # Nothing of the parent may be ended twice: neither pytest nor its plugins.
    os._exit(0)
