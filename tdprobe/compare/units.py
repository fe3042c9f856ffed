"""Units of work: fixed numbers of batches, whatever the number of processes that share them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import chain, count, islice
from typing import Any

import torch
from tensordict import is_tensor_collection
from torch import Tensor

from tdprobe import hf
from tdprobe.errors import ConfigError

# Samples of one unit, where nothing else is asked for: many portions of rows of tokens, and one of rows of texts.
DEFAULT_SAMPLES = 512


def unit_size(unit: int | None, rows_per_update: int, batch_size: int) -> int:
    """Return the number of batches in a unit.

    Every sample gives a row at least, so by default a unit fills a portion of rows at least.

    Args:
        unit: What the user asks for.
        rows_per_update: Rows of a portion.
        batch_size: Samples of a batch, at least.

    Raises:
        ConfigError: A unit without any batch.
    """
    if unit is None:
        return -(-max(DEFAULT_SAMPLES, rows_per_update) // max(batch_size, 1))
    if isinstance(unit, bool) or not isinstance(unit, int) or unit < 1:
        raise ConfigError(f"unit is a number of batches (an int of at least 1), got {unit!r}")
    return unit


class Units:
    """Cut batches into units: a short rest belongs to the unit before, where the number of batches is known.

    Args:
        streams: The batches of each checkpoint, side by side.
        size: Batches of a unit.

    Example:
        >>> units = Units([list("abcdefg")], 3)
        >>> [(unit, list(part)) for unit, part in units.walk(lambda unit: unit == 1)]
        [(1, [(3, ('d',)), (4, ('e',)), (5, ('f',)), (6, ('g',))])]
        >>> len(units)
        2
    """

    def __init__(self, streams: Sequence[Any], size: int) -> None:
        # The user's own batches are one iterable for all checkpoints: walking it once for each would drain a generator.
        self._streams = streams[:1] if all(stream is streams[0] for stream in streams) else streams
        self._copies = len(streams) // len(self._streams)
        self._size = size
        self._length = len(streams[0]) if all(isinstance(stream, Sized) for stream in streams) else None
        self._seen = 0

    def __len__(self) -> int:
        """Count the units; of batches that come one by one, those so far."""
        if self._length is None:
            return self._seen
        return max(1, (self._length + self._size // 2) // self._size)

    def n_batches(self, wanted: Callable[[int], bool]) -> int | None:
        """Count the batches in the units that are wanted, where that is known."""
        if self._length is None:
            return None
        return sum(stop - start for unit, (start, stop) in enumerate(self._bounds()) if wanted(unit))

    def walk(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Iterator[tuple[int, tuple[Any, ...]]]]]:
        """Yield the units that are wanted, each with its numbered batches.

        Others are not even read, where batches can be picked; otherwise they are read and dropped.
        """
        picked = self._length is not None and all(hasattr(stream, "__getitem__") for stream in self._streams)
        items = enumerate(zip(*self._streams, strict=True)) if not picked else iter(())
        for unit, (start, stop) in enumerate(self._bounds()):
            part = map(self._pick, range(start, stop)) if picked else islice(items, stop - start)
            first = next(part, None) if wanted(unit) or not picked else (start, ())
            if first is None:
                return
            self._seen = unit + 1
            if wanted(unit):
                yield unit, ((number, item * self._copies) for number, item in chain([first], part))
            if not picked:
                deque(part, maxlen=0)

    def _pick(self, number: int) -> tuple[int, tuple[Any, ...]]:
        return number, tuple(stream[number] for stream in self._streams)

    def _bounds(self) -> Iterator[tuple[int, int]]:
        size, last = self._size, None if self._length is None else len(self) - 1
        for unit in count() if last is None else range(last + 1):
            yield unit * size, self._length if unit == last and self._length is not None else (unit + 1) * size


def data_facts(batches: Any) -> dict[str, Any] | None:
    """Say what is compared on, so that another run can be told to be on the same; ``None`` where batches pass once.

    Example:
        >>> data_facts(["one", "two"]) == data_facts(["one", "two"])
        True
    """
    if isinstance(batches, hf.TextBatches):
        return {"texts": len(batches.texts), "batches": len(batches), "fingerprint": _fingerprint(batches.texts)}
    if not isinstance(batches, Sequence):
        return None
    kind = "texts" if isinstance(batches[0], str) else "batches"
    return {kind: len(batches), "fingerprint": _fingerprint(batches)}


def _fingerprint(items: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        _feed(digest, item)
    return digest.hexdigest()


def _feed(digest: Any, item: Any) -> None:
    if isinstance(item, hf.TextBatch):
        _feed(digest, item.inputs)
    elif isinstance(item, Tensor):
        flat = item.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{tuple(item.shape)}{item.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(item, Mapping) or is_tensor_collection(item):
        for key, value in sorted(item.items(), key=lambda pair: str(pair[0])):
            digest.update(str(key).encode())
            _feed(digest, value)
    elif isinstance(item, (tuple, list)):
        for value in item:
            _feed(digest, value)
    else:
        digest.update(repr(item).encode() + b"\0")
