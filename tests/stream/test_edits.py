"""What is taken from a value by a clause goes back to where it came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdprobe.stream.call import Call
from tdprobe.stream.edits import write_rows
from tdprobe.stream.rows import token_rows
from tdprobe.stream.tokens import TokenClause

MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()


@given(
    st.sampled_from(["last", "all", 0, -2, "1:", [0, -1], MASK]),
    st.sampled_from([(3, 4, 5), (3, 4, 2, 3), (12, 5), (3, 4, 1)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_rows_go_back_to_where_they_came_from(tokens: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    selection = TokenClause(tokens).select(Call((3, 4), MASK))
    value = torch.randn(shape, dtype=dtype)
    before = value.clone()
    rows = token_rows("layer", value, selection)
    assert torch.equal(write_rows("layer", value, selection, rows), value)
    new = torch.arange(rows.numel()).reshape(rows.shape).float() + 100
    written = write_rows("layer", value, selection, new)
    assert written.dtype == dtype and torch.equal(token_rows("layer", written, selection), new.to(dtype))
    assert torch.equal(value, before)
    # What was not selected is as before.
    touched = write_rows("layer", torch.zeros_like(value), selection, torch.ones_like(new)).bool()
    assert torch.equal(written[~touched], value[~touched]) and touched.sum() == rows.numel()


def test_a_value_with_one_row_per_sample() -> None:
    selection = TokenClause("last").select(Call((3, 4), MASK))
    value, rows = torch.zeros(3, 5), torch.arange(15.0).view(3, 5)
    assert torch.equal(write_rows("pooled", value, selection, rows), rows)


@pytest.mark.parametrize("rows", [torch.ones(2, 5), torch.ones(3, 4), torch.ones(1, 5)])
def test_rows_of_another_shape_are_refused(rows: Tensor) -> None:
    selection = TokenClause("last").select(Call((3, 4), MASK))
    with pytest.raises(ValueError, match=r"layer 'h': the new rows have shape .*, those of .* \(3, 5\)"):
        write_rows("h", torch.zeros(3, 4, 5), selection, rows)


def test_gradients_reach_the_rows_and_the_rest() -> None:
    selection = TokenClause("last").select(Call((3, 4), MASK))
    value, rows = torch.zeros(3, 4, 2, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    write_rows("h", value, selection, rows).sum().backward()
    assert rows.grad.eq(1).all() and value.grad.sum() == 24 - 6
