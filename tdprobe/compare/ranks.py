"""The processes that share the work of one comparison."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tdprobe.errors import ConfigError, RankError, TdprobeError
from tdprobe.stats.sync import DEFAULT_TIMEOUT, receive_bytes, send_bytes
from tdprobe.tables import ScoreTable


@dataclass(frozen=True)
class Ranks:
    """Say which of several processes this is; all of them do the same calls in the same order.

    Args:
        rank: Number of this process.
        world: How many there are.
        timeout: Seconds to wait for another one.
    """

    rank: int = 0
    world: int = 1
    timeout: float = DEFAULT_TIMEOUT

    @classmethod
    def here(cls, distributed: bool | None = None, timeout: float = DEFAULT_TIMEOUT) -> Ranks:
        """Return the rank in the default process group, or the only one.

        Args:
            distributed: Whether to share the work; by default where a process group is initialised.
            timeout: Seconds to wait for another process.

        Raises:
            ConfigError: There is no process group to share the work in.
        """
        if not timeout > 0:
            raise ConfigError(f"timeout counts seconds to wait for another process (a number above 0), got {timeout!r}")
        there = dist.is_available() and dist.is_initialized()
        if distributed and not there:
            raise ConfigError(
                "distributed=True needs a process group: call torch.distributed.init_process_group first, or start "
                "the program with torchrun --nproc-per-node N -m tdprobe compare ..."
            )
        if not there or distributed is False:
            return cls(timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), timeout)

    @property
    def first(self) -> bool:
        """Whether this is the rank that merges, writes and prints."""
        return self.rank == 0

    def owns(self, unit: int) -> bool:
        """Tell whether a unit of work is for this rank."""
        return unit % self.world == self.rank

    def send(self, data: bytes, to: int = 0) -> None:
        """Send bytes to a rank that receives them.

        Raises:
            RankError: It has ended or is silent.
        """
        send_bytes(data, to, timeout=self.timeout)

    def receive(self, source: int = 0) -> bytes:
        """Receive bytes from a rank that sends them.

        Raises:
            RankError: It has ended or is silent.
        """
        return receive_bytes(source, timeout=self.timeout)

    def shared(self, data: bytes) -> bytes:
        """Return the bytes of rank 0 on every rank."""
        if self.first:
            for other in range(1, self.world):
                self.send(data, other)
            return data
        return self.receive()

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Make sure that all ranks say the same.

        Raises:
            ConfigError: They do not; raised on every rank.
            RankError: A rank has ended or is silent.
        """
        if self.world == 1:
            return
        own = json.dumps(facts)
        if not self.first:
            self.send(own.encode())
            verdict = self.receive().decode()
        else:
            said = {rank: json.loads(self.receive(rank)) for rank in range(1, self.world)}
            gaps = [(rank, gap) for rank, other in said.items() if (gap := difference(json.loads(own), other))]
            verdict = "".join(
                f"rank 0 has {name}={ours!r} and rank {rank} has {name}={theirs!r}; every rank must compare the same "
                "models over the same batches, in the same order"
                for rank, (name, ours, theirs) in gaps[:1]
            )
            self.shared(verdict.encode())
        if verdict:
            raise ConfigError(verdict)


def table_of_first(ranks: Ranks, score: Callable[[], ScoreTable]) -> ScoreTable:
    """Return on every rank the table that rank 0 works out."""
    if ranks.world == 1:
        return score()
    text = ranks.shared(score().to_json().encode() if ranks.first else b"")
    return ScoreTable.from_json(text.decode())


def difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return name and values of the first field in which two JSON values differ.

    Example:
        >>> difference({"a": 1, "b": {"c": [2]}}, {"a": 1, "b": {"c": [3]}})
        ('b.c', [2], [3])
    """
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return None if ours == theirs else (name, ours, theirs)
    found = (
        difference(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
        for key in dict.fromkeys([*ours, *theirs])
    )
    return next((gap for gap in found if gap), None)


@contextmanager
def launched_ranks(device: str | None, timeout: float) -> Generator[str | None]:
    """Join the processes that torchrun started, if it did: gloo, or nccl where models run on GPUs.

    A signal to end, which torchrun sends to the others when one process dies, becomes an error that says so.

    Args:
        device: Where models shall run.
        timeout: Seconds to wait for another process.

    Yields:
        The device of this process: of ``"cuda"``, the one with its local rank.

    Raises:
        ConfigError: The variables that torchrun sets are incomplete.
        RankError: The other processes do not come, or this one is told to end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield device
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set and {', '.join(missing)} not; start with torchrun, or unset WORLD_SIZE")
    on_gpu = device is not None and device.startswith("cuda") and torch.cuda.is_available()
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
        torch.cuda.set_device(device)
        # Otherwise a rank that waits for a dead one is aborted without a word.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {os.environ['RANK']} could not join the others: {error}") from error
    before = _when_told_to_end(_told_to_end)
    try:
        yield device
    except BaseException:
        # The signal of torchrun may still be to come, before the user has seen the error. Python complains of SIG_IGN
        # where one is just coming.
        before = _no_news
        raise
    finally:
        _when_told_to_end(before)
        dist.destroy_process_group()


def _told_to_end(*_: Any) -> None:
    # An error that is on its way already says more.
    if isinstance(sys.exception(), (TdprobeError, KeyboardInterrupt)):
        return
    raise RankError("this process was told to end, as torchrun does when another one has ended; see what that printed")


def _no_news(*_: Any) -> None:
    """Go on to the end."""


def _when_told_to_end(handler: Any) -> Any:
    # Only the main thread may take signals.
    main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if main else None
