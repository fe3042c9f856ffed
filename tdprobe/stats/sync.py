"""States of several processes become one: bytes of safetensors go from rank to rank, never pickles."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tdprobe.errors import RankError
from tdprobe.stats import files
from tdprobe.stats.saved import flatten, restore
from tdprobe.stats.state import State

DEFAULT_TIMEOUT = 1800.0
# Bytes that are on their way at once.
PIECE = 64 * 2**20


def send_bytes(data: bytes, to: int, group: Any = None, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Send bytes to a rank of a process group, which calls `receive_bytes`.

    Args:
        data: The bytes.
        to: Rank in the group.
        group: A process group; the default one by default.
        timeout: Seconds to wait for the other side.

    Raises:
        RankError: The other rank has ended, or is silent for too long.
    """
    device = _device(group)
    _wait(to, timeout, dist.isend, torch.tensor([len(data)], device=device), group=group, group_dst=to)
    for start in range(0, len(data), PIECE):
        piece = torch.frombuffer(bytearray(data[start : start + PIECE]), dtype=torch.uint8)
        _wait(to, timeout, dist.isend, piece.to(device), group=group, group_dst=to)


def receive_bytes(source: int, group: Any = None, timeout: float = DEFAULT_TIMEOUT) -> bytes:
    """Receive what a rank of a process group sends with `send_bytes`.

    Args:
        source: Rank in the group.
        group: A process group; the default one by default.
        timeout: Seconds to wait for the other side.

    Raises:
        RankError: The other rank has ended, or is silent for too long.
    """
    device = _device(group)
    size = torch.zeros(1, dtype=torch.int64, device=device)
    _wait(source, timeout, dist.irecv, size, group=group, group_src=source)
    data = bytearray(int(size))
    for start in range(0, len(data), PIECE):
        piece = torch.empty(min(PIECE, len(data) - start), dtype=torch.uint8, device=device)
        _wait(source, timeout, dist.irecv, piece, group=group, group_src=source)
        data[start : start + len(piece)] = memoryview(piece.cpu().numpy())
    return bytes(data)


def synced(state: State, group: Any = None, timeout: float = DEFAULT_TIMEOUT) -> Any:
    """Merge the states of all ranks, in the order of ranks, and return the result to each of them.

    Every rank sends its state to rank 0, one after the other, and gets the merged one back.

    Args:
        state: The state of this rank; all are over the same layers.
        group: A process group; the default one by default.
        timeout: Seconds to wait for another rank.

    Returns:
        The merged state, on the devices of the state that was given.

    Raises:
        RankError: Another rank has ended, or is silent for too long.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank > 0:
        send_bytes(_packed(state), 0, group, timeout)
        return placed_like(_unpacked(receive_bytes(0, group, timeout), 0), state)
    merged = state
    for other in range(1, world):
        merged = merged.merge(placed_like(_unpacked(receive_bytes(other, group, timeout), other), state))
    data = _packed(merged) if world > 1 else b""
    for other in range(1, world):
        send_bytes(data, other, group, timeout)
    return merged


def placed_like(state: Any, other: State) -> Any:
    """Move each tensor of a state to where the tensor of that name is in another state: the parts of one may differ."""
    places = {name: x.device for name, x in other.items(include_nested=True, leaves_only=True)}
    return state.named_apply(lambda name, x: x.to(places.get(name, x.device)), nested_keys=True)


def _packed(state: State) -> bytes:
    tensors: dict[str, Tensor] = {}
    tree = flatten(state, tensors)
    return files.pack("tdprobe.state", tensors, {"state": tree})


def _unpacked(data: bytes, source: int) -> State:
    tensors, header = files.unpack(data, "tdprobe.state", f"what rank {source} sent")
    return restore(header["state"], tensors, f"rank {source}")


def _device(group: Any) -> torch.device:
    # NCCL moves memory of the GPU only.
    return torch.device("cuda" if "nccl" in str(dist.get_backend(group)) else "cpu")


def _wait(other: int, timeout: float, start: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    began = monotonic()
    try:
        start(*args, **kwargs).wait(timedelta(seconds=timeout))
    except RuntimeError as error:
        if monotonic() - began < timeout:
            raise RankError(f"rank {other} has ended before its work was done; see what it printed") from error
        raise RankError(
            f"rank {other} has been silent for {timeout:g} seconds; see what it printed, and raise the timeout where "
            "it is only slow"
        ) from error
