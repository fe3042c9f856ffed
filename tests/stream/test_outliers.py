"""Rows with massive activations leave every layer; nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdprobe.errors import ConfigError
from tdprobe.latent.representation_similarity import cka_matrix
from tdprobe.stream.batch import Batch
from tdprobe.stream.outliers import check_max_norm, without_outliers


def rows_of_length(lengths: list[float], width: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows whose Euclidean lengths are given, each in a direction of its own."""
    directions = torch.randn(len(lengths), width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = directions / directions.norm(dim=1, keepdim=True)
    return (unit * torch.tensor(lengths, dtype=torch.float64)[:, None]).to(dtype)


def left(max_norm: float | None, **lengths: list[float]) -> list[int]:
    n = len(next(iter(lengths.values())))
    batch = Batch({name: rows_of_length(found) for name, found in lengths.items()}, torch.arange(n))
    kept = without_outliers(batch, max_norm)
    for name, values in kept.rows.items():
        assert torch.equal(values, batch.rows[name][kept.ids])
    return kept.ids.tolist()


def test_a_row_that_is_long_in_one_layer_leaves_all() -> None:
    ordinary = [1.0] * 9
    assert left(10, a=[*ordinary, 11], b=[1.0] * 10) == list(range(9))
    assert left(10, a=[11, *ordinary], b=[1.0] * 9 + [1000]) == list(range(1, 9))
    assert left(10, a=[*ordinary, 9.9], b=[0.001] * 10) == list(range(10))
    assert left(None, a=[*ordinary, 1e6]) == list(range(10))


@given(
    st.lists(st.floats(0.5, 60), min_size=8, max_size=40),
    st.floats(1.01, 20),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_limit_counts_lower_medians_at_any_scale(lengths: list[float], max_norm: float, scale: float) -> None:
    limit = sorted(lengths)[(len(lengths) - 1) // 2] * max_norm
    if any(abs(length / limit - 1) < 1e-4 for length in lengths):
        return
    wanted = [place for place, length in enumerate(lengths) if length <= limit]
    assert left(max_norm, a=[length * scale for length in lengths], b=[1.0] * len(lengths)) == wanted


def test_few_rows_and_silent_layers_have_no_typical_length() -> None:
    assert left(2, a=[1.0] * 6 + [1000]) == list(range(7))
    assert left(2, a=[1.0] * 7 + [1000]) == list(range(7))
    assert left(2, a=[0.0] * 6 + [1.0, 5.0, 1000.0], b=[1.0] * 9) == list(range(9))


def test_a_batch_without_outliers_is_handed_back_as_it_is() -> None:
    batch = Batch({"a": rows_of_length([1.0] * 20)}, torch.arange(20))
    assert without_outliers(batch, 10) is batch


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_rows_stay_so_that_they_show(value: float) -> None:
    rows = rows_of_length([1.0] * 10 + [500.0])
    rows[3, 1] = value
    kept = without_outliers(Batch({"a": rows, "b": torch.ones(11, 2)}, torch.arange(11)), 10)
    assert kept.ids.tolist() == list(range(10))
    assert not kept.rows["a"][3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_beyond_float32_are_outliers_not_infinities(dtype: torch.dtype) -> None:
    rows = rows_of_length([1.0] * 10, dtype=dtype)
    rows[4] = 3e38
    assert without_outliers(Batch({"a": rows}, torch.arange(10)), 10).ids.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_half_precision_is_measured_in_float32() -> None:
    # The squares of 300 overflow float16.
    lengths = [300.0] * 10 + [6000.0]
    batch = Batch({"a": rows_of_length(lengths, dtype=torch.float16)}, torch.arange(11))
    assert without_outliers(batch, 10).ids.tolist() == list(range(10))


def test_integer_rows_are_measured_too() -> None:
    rows = torch.ones(9, 2, dtype=torch.long)
    rows[2] = -90
    assert without_outliers(Batch({"a": rows}, torch.arange(9)), 10).ids.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("unbiased", [False, True])
def test_one_row_decides_raw_similarity_and_none_of_the_rest(unbiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    # Unrelated layers come to look alike by a row that is long in both; by one that is long in one of them, related
    # layers come to look unrelated.
    one, other = (a, a + 0.3 * b) if unbiased else (a, b)
    clean = cka_matrix([one, other], unbiased=unbiased)[0, 1]
    scale = torch.ones(400, 1, dtype=torch.float64)
    scale[17] = 1000
    batch = Batch({"a": one * scale, "b": other if unbiased else other * scale}, torch.arange(400))
    raw = cka_matrix(list(batch.rows.values()), unbiased=unbiased)[0, 1]
    robust = cka_matrix(list(without_outliers(batch, 10).rows.values()), unbiased=unbiased)[0, 1]
    assert raw < clean - 0.3 if unbiased else raw > clean + 0.3
    assert abs(robust - clean) < 0.01


@pytest.mark.parametrize("max_norm", [None, 1.5, 10, 1e6])
def test_limits_that_are_allowed(max_norm: float | None) -> None:
    check_max_norm(max_norm)


@pytest.mark.parametrize("max_norm", [0, 1, -3.0, float("nan"), float("inf"), True, "ten", [10]])
def test_limits_that_are_not(max_norm: Any) -> None:
    with pytest.raises(ConfigError, match="max_norm counts median row lengths"):
        check_max_norm(max_norm)
