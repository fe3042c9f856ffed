"""The selection clause against a plain reference, row by row, under every padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdprobe.stream.call import Call
from tdprobe.stream.tokens import Selection, TokenClause

T = 7


def padded(lengths: list[int], side: str) -> Tensor:
    rows = [[1] * n + [0] * (T - n) for n in lengths]
    return torch.tensor([row if side == "right" else row[::-1] for row in rows])


def call_of(lengths: list[int], side: str = "right") -> Call:
    return Call((len(lengths), T), padded(lengths, side), torch.ones(len(lengths), T, dtype=torch.long))


def reference(tokens: Any, skip: int, n: int) -> list[int]:
    """Say which of n real tokens count, by Python's own indexing."""
    all_of = list(range(n))
    if tokens in ("all", "mean", "prompt"):
        found = all_of
    elif tokens == "last":
        found = all_of[-1:]
    else:
        parts = tokens if isinstance(tokens, (list, tuple, range)) else [tokens]
        found = []
        for part in parts:
            if isinstance(part, str):
                part = slice(*(int(edge) if edge else None for edge in part.split(":")))
            if isinstance(part, slice):
                found += all_of[part]
            elif -n <= part < n:
                found.append(all_of[part])
    return sorted({i for i in found if i >= skip})


edges = st.none() | st.integers(-9, 9)
spans = st.builds(slice, edges, edges, st.none() | st.integers(1, 3))
clauses = st.one_of(
    st.sampled_from(["last", "all", "prompt"]),
    st.integers(-8, 8),
    spans,
    st.lists(st.integers(-8, 8) | spans, min_size=1, max_size=3),
    st.builds(lambda a, b: f"{'' if a is None else a}:{'' if b is None else b}", edges, edges),
    st.builds(range, st.integers(-5, 5), st.integers(-5, 8), st.sampled_from([1, 2, -1])).filter(len),
)
batches = st.lists(st.integers(1, T), min_size=1, max_size=4)


def numbered(batch: int) -> Tensor:
    """Give each position of each row a value of its own."""
    return torch.arange(batch * T * 2, dtype=torch.float64).reshape(batch, T, 2)


@settings(deadline=None)
@given(clauses, st.integers(0, 3), batches, st.sampled_from(["left", "right"]))
def test_a_clause_selects_what_python_indexing_of_the_real_tokens_selects(
    tokens: Any, skip: int, lengths: list[int], side: str
) -> None:
    values, call = numbered(len(lengths)), call_of(lengths, side)
    clause = TokenClause(tokens, skip)
    wanted = []
    for row, n in enumerate(lengths):
        first = 0 if side == "right" else T - n
        wanted += [(row, i, values[row, first + i].tolist()) for i in reference(tokens, skip, n)]
    if not wanted:
        with pytest.raises(ValueError, match="matches no token of this batch"):
            clause.select(call)
        return
    chosen = clause.select(call)
    rows = chosen.take(values)
    got = list(zip(chosen.sample.tolist(), chosen.position.tolist(), rows.tolist(), strict=True))
    assert got == wanted and chosen.n == len(wanted)
    assert torch.equal(chosen.take(values.reshape(-1, 2)), rows)


@given(st.integers(0, 3), batches, st.sampled_from(["left", "right"]))
def test_the_mean_is_over_the_real_tokens_of_each_row(skip: int, lengths: list[int], side: str) -> None:
    values, call = numbered(len(lengths)), call_of(lengths, side)
    wanted = []
    for row, n in enumerate(lengths):
        real = values[row, :n] if side == "right" else values[row, T - n :]
        wanted += [real[skip:].mean(0)] if n > skip else []
        # What stands at pads must not matter, be it NaN.
        (values[row, n:] if side == "right" else values[row, : T - n]).fill_(float("nan"))
    if not wanted:
        with pytest.raises(ValueError, match="matches no token"):
            TokenClause("mean", skip).select(call)
        return
    chosen = TokenClause("mean", skip).select(call)
    torch.testing.assert_close(chosen.take(values), torch.stack(wanted))
    assert chosen.sample.tolist() == [row for row, n in enumerate(lengths) if n > skip]


@pytest.mark.parametrize("tokens", ["last", "mean", "all", 0, -1, "1:3"])
def test_rows_with_all_tokens_real_need_no_mask(tokens: Any) -> None:
    values = numbered(2)
    with_mask = TokenClause(tokens).select(Call((2, T), torch.ones(2, T))).take(values)
    assert torch.equal(TokenClause(tokens).select(Call((2, T))).take(values), with_mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", ["last", "all", "mean"])
def test_values_keep_their_dtype_and_means_accumulate_in_float32_at_least(tokens: Any, dtype: Any) -> None:
    # 2048 + 1 + 1 + ...: every partial sum in fp16 or bf16 would drop the ones.
    values = torch.ones(1, T, 1, dtype=dtype)
    values[0, 0] = 2048
    rows = TokenClause(tokens).select(Call((1, T))).take(values)
    if tokens != "mean":
        assert rows.dtype == dtype and torch.equal(rows, values[0] if tokens == "all" else values[0, -1:])
    else:
        assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(rows.double(), torch.tensor([[(2048 + T - 1) / T]]).double())


def test_trailing_axes_are_flattened_into_the_width() -> None:
    values = torch.arange(2 * T * 6.0).reshape(2, T, 2, 3)
    rows = TokenClause("last").select(call_of([2, 3])).take(values)
    assert torch.equal(rows, torch.stack([values[0, 1].flatten(), values[1, 2].flatten()]))


@pytest.mark.parametrize("way", ["mask", "callable"])
def test_a_mask_of_ones_own_never_selects_pads(way: str) -> None:
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[0, 1:5] = True
    mask[1, 6] = True
    seen: list[Call] = []
    tokens = mask if way == "mask" else lambda call: (seen.append(call), mask)[1]
    call = call_of([3, T])
    chosen = TokenClause(tokens, skip_first=2).select(call)
    assert list(zip(chosen.sample.tolist(), chosen.position.tolist(), strict=True)) == [(0, 2), (1, 6)]
    assert all(one is call for one in seen)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (torch.ones(2, T), "bool tensor of shape .*torch.float32"),
        (lambda call: None, "bool tensor.*NoneType"),
        (torch.ones(2, T - 1, dtype=torch.bool), r"shape \(2, 6\), the batch \(2, 7\)"),
        (torch.zeros(2, T, dtype=torch.bool), "matches no token"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tokens: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TokenClause(tokens).select(Call((2, T)))


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ("lats", "unknown token selection 'lats'; did you mean 'last'"),
        ("", "unknown token selection"),
        ("-:2", "unknown token selection"),
        ("1:2:3", "unknown token selection"),
        ([], "ints or slices"),
        (range(0), "ints or slices"),
        (["last"], "ints or slices"),
        ([True], "ints or slices"),
        (True, "tokens is one of"),
        (None, "tokens is one of"),
        (1.5, "tokens is one of"),
        (slice(0, 3, 0), "step of at least 1"),
        (slice(3, 0, -1), "step of at least 1"),
        ([slice("a", None)], "int edges"),
    ],
)
def test_what_is_no_clause_is_refused_at_once(tokens: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TokenClause(tokens)


@pytest.mark.parametrize("skip", [-1, 1.0, True, None])
def test_skip_first_counts_tokens(skip: Any) -> None:
    with pytest.raises(ValueError, match="skip_first"):
        TokenClause("all", skip)


def test_a_selection_is_made_once_per_call() -> None:
    made = []
    clause = TokenClause(lambda call: (made.append(1), torch.ones(1, T, dtype=torch.bool))[1])
    call = Call((1, T))
    assert isinstance(clause.select(call), Selection)
    assert clause.select(call) is clause.select(call) and made == [1]


# Steps of cached decoding: two rows of 3 and 5 prompt tokens, left-padded to 5, then one token at a time.

STEPS = [
    Call((2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), continues=True),
    *(
        Call(
            (2, 1),
            torch.tensor([[0, 0, 1, 1, 1] + [1] * k, [1] * (5 + k)]),
            phase="generated",
            continues=True,
        )
        for k in (1, 2, 3)
    ),
]


@pytest.mark.parametrize(
    ("tokens", "skip", "positions"),
    [
        (
            "all",
            0,
            [{0: [0, 1, 2], 1: [0, 1, 2, 3, 4]}, {0: [3], 1: [5]}, {0: [4], 1: [6]}, {0: [5], 1: [7]}],
        ),
        ("prompt", 4, [{1: [4]}, {}, {}, {}]),
        ("generated", 0, [{}, {0: [3], 1: [5]}, {0: [4], 1: [6]}, {0: [5], 1: [7]}]),
        ("last", 0, [{0: [2], 1: [4]}, {}, {}, {}]),
        (-2, 0, [{0: [1], 1: [3]}, {}, {}, {}]),
        ("-2:", 0, [{0: [1, 2], 1: [3, 4]}, {}, {}, {}]),
        ([3, 7], 0, [{1: [3]}, {0: [3]}, {}, {1: [7]}]),
        ("5:7", 0, [{}, {1: [5]}, {1: [6]}, {0: [5]}]),
        ("generated", 5, [{}, {1: [5]}, {1: [6]}, {0: [5], 1: [7]}]),
    ],
)
def test_positions_go_on_through_cached_decoding(tokens: Any, skip: int, positions: Any) -> None:
    clause, found = TokenClause(tokens, skip), []
    for call in STEPS:
        chosen = clause.select(call)
        rows: dict[int, list[int]] = {}
        for sample, position in zip(chosen.sample.tolist(), chosen.position.tolist(), strict=True):
            rows.setdefault(sample, []).append(position)
        found.append(rows)
        assert chosen.take(torch.zeros(*call.shape, 3)).shape == (chosen.n, 3)
    assert found == positions
