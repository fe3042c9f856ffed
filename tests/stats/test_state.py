"""What all statistics ask of rows."""

from __future__ import annotations

import pytest
import torch

from tdprobe.stats.state import all_finite, centre

HALF_INTEGER = (torch.float16, torch.int64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(bad):
    for place in range(12):
        x = torch.arange(24, dtype=torch.float32)
        x[place] = bad
        assert all_finite(x.reshape(2, 3, 4)).tolist() == [False, True]


@pytest.mark.parametrize("dtype", HALF_INTEGER)
def test_finite_and_empty_rows_are_finite(dtype):
    assert all_finite(torch.ones(2, 3, 4).to(dtype)).tolist() == [True, True]
    assert all_finite(torch.ones(2, 0, 4).to(dtype)).tolist() == [True, True]
    assert all_finite(torch.ones(3, 0).to(dtype)).tolist() is True


@pytest.mark.parametrize("dtype", HALF_INTEGER)
def test_rows_are_centred_in_the_dtype_asked_for(dtype):
    x = torch.tensor([[2000, 1], [2004, 3]]).to(dtype)
    out = torch.empty(3, 2, dtype=torch.float64)
    rows, mean = centre(x, torch.float64, out=out[:2])
    assert rows.tolist() == out[:2].tolist() == [[-2, -1], [2, 1]] and mean.tolist() == [2002, 2]
    kept = x.double()
    assert centre(kept, torch.float64)[0].tolist() == [[-2, -1], [2, 1]] and torch.equal(kept, x.double())
