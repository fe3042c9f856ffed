"""Portions of rows, and the batches they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdprobe.errors import ConfigError
from tdprobe.stream.batch import Batch
from tdprobe.stream.buffer import RowBuffer


def batch(start: int, n: int, width: int = 2) -> Batch:
    ids = torch.arange(start, start + n)
    rows = ids.double()[:, None]
    return Batch({"a": rows.expand(n, width), "b": -rows}, ids)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 10), st.integers(1, 5))
def test_portions_are_full_in_order_and_lose_nothing(sizes: list[int], portion: int, reserve: int) -> None:
    buffer, start, parts = RowBuffer(portion, reserve), 0, []
    for n in sizes:
        buffer.push(batch(start, n))
        start += n
        parts += list(buffer.portions())
        assert buffer.n < portion + reserve
    assert all(part.n == portion for part in parts)
    rest = buffer.rest()
    assert rest.n == buffer.n >= (reserve if parts else 1) and buffer.rest().n == rest.n
    whole = [*parts, rest]
    assert torch.cat([part.ids for part in whole]).tolist() == list(range(start))
    assert torch.equal(torch.cat([part.rows["b"] for part in whole])[:, 0], -torch.arange(start).double())


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ({"a": torch.zeros(2, 2)}, "'b' did not run"),
        (
            {"a": torch.zeros(2, 2), "b": torch.zeros(2, 1), "c": torch.zeros(2, 1)},
            "'c' ran for the first time",
        ),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)}, "'a' gave rows of width 3 after 2"),
    ],
)
def test_later_rows_must_come_from_the_same_layers(rows: Any, problem: str) -> None:
    buffer = RowBuffer(4)
    buffer.push(batch(0, 2))
    with pytest.raises(ConfigError, match=problem):
        buffer.push(Batch(rows, torch.arange(2)))
    assert buffer.n == 2


@pytest.mark.parametrize(
    ("rows", "ids", "problem"),
    [
        ({}, torch.arange(2), "without layers"),
        ({"a": torch.zeros(2)}, torch.arange(2), r"'a' has shape \(2,\)"),
        (
            {"a": torch.zeros(3, 1), "b": torch.zeros(2, 1), "c": torch.zeros(3, 1)},
            torch.arange(3),
            "'b' has 2 rows, but 'a', 'c' 3",
        ),
        ({"a": torch.zeros(2, 1)}, torch.arange(3), r"\(2,\) torch.int64"),
        ({"a": torch.zeros(2, 1)}, torch.zeros(2), "torch.int64"),
    ],
)
def test_a_batch_has_one_row_and_one_id_per_sample_in_every_layer(rows: Any, ids: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Batch(rows, ids)
