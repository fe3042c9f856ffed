from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdprobe.stats.topk import TopK, TopKState


def over(parts: list[tuple[Tensor, Tensor]], k: int) -> TopKState:
    """One state over the parts of a stream with one layer."""
    statistic = TopK(k)
    state = statistic.init([parts[0][0]], parts[0][1])
    for rows, ids in parts:
        state = statistic.update(state, [rows], ids)
    return state


def reference(rows: Tensor, ids: Tensor, k: int) -> tuple[list[Any], list[Any]]:
    """Sort every unit in plain Python: by value downwards, then by id upwards, each row once."""
    values, found = [], []
    for unit in rows.T.tolist():
        best: dict[int, float] = {}
        for value, row in zip(unit, ids.tolist(), strict=True):
            best[row] = max(value, best.get(row, -np.inf))
        order = sorted(best, key=lambda row: (-best[row], row))[:k]
        values.append([best[row] for row in order])
        found.append(order)
    return values, found


def plain(state: TopKState) -> tuple[list[Any], list[Any]]:
    return state.top["0"].tolist(), state.ids["0"].tolist()


# Few values and few ids, so that ties and repetitions are the rule.
STREAM = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


def tensors(stream: Any) -> list[tuple[Tensor, Tensor]]:
    table = [torch.tensor(part) for part in stream]
    return [(part[:, 1:].float(), part[:, 0]) for part in table]


@given(stream=STREAM, k=st.integers(1, 5))
def test_a_stream_keeps_the_largest_different_rows(stream: Any, k: int) -> None:
    parts = tensors(stream)
    rows, ids = torch.cat([r for r, _ in parts]), torch.cat([i for _, i in parts])
    state = over(parts, k)
    assert int(state.n) == len(rows)
    if len(set(ids.tolist())) == len(ids):
        assert plain(state) == reference(rows, ids, k)
    else:
        # A row that left the state can come back with a smaller value; what is kept is right as far as it goes.
        values, _ = reference(rows, ids, k)
        assert [unit[0] for unit in plain(state)[0]] == [unit[0] for unit in values]


@given(stream=STREAM.filter(lambda s: len(s) > 1), k=st.integers(1, 5), data=st.data())
def test_merging_in_any_order_is_one_stream(stream: Any, k: int, data: st.DataObject) -> None:
    # Equal ids are equal rows: the value of a unit is a function of the id.
    parts = [(torch.stack([ids % 3, -ids % 4], 1).float(), ids) for _, ids in tensors(stream)]
    whole = reference(torch.cat([r for r, _ in parts]), torch.cat([i for _, i in parts]), k)
    assert plain(over(parts, k)) == whole
    states = data.draw(st.permutations([over([part], k) for part in parts]))
    cut = data.draw(st.integers(1, len(states) - 1))
    left, right = states[0], states[cut]
    for state in states[1:cut]:
        left = left.merge(state)
    for state in states[cut + 1 :]:
        right = right.merge(state)
    assert plain(left.merge(right)) == plain(right.merge(left)) == whole


def test_layers_of_different_widths_and_precision() -> None:
    ids = torch.arange(50)
    rows = [torch.randn(50, 3).bfloat16(), torch.randn(50, 5).double()]
    statistic = TopK(4)
    state = statistic.update(statistic.init(rows, ids), rows, ids)
    assert state.top["0"].shape == (3, 4) and state.top["1"].shape == (5, 4)
    assert state.top["0"].dtype == state.top["1"].dtype == torch.float64
    for key, x in zip("01", rows, strict=True):
        expected = x.double().topk(4, dim=0)
        assert torch.equal(state.top[key], expected.values.T)


def test_nan_shows() -> None:
    rows = torch.tensor([[1.0], [torch.nan], [2.0]])
    assert over([(rows, torch.arange(3))], 2).top["0"].isnan().tolist() == [[True, False]]


def test_a_state_keeps_its_value_and_can_be_stored() -> None:
    rows, ids = torch.randn(6, 2), torch.arange(6)
    state = over([(rows, ids)], 3)
    before = plain(state)
    TopK(3).update(state, [rows + 10], ids + 100)
    assert plain(state) == before
    assert plain(state.clone()) == before


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_a_number_that_keeps_nothing_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match="integers from 1"):
        TopK(k)


def test_states_that_do_not_fit_are_refused() -> None:
    rows, ids = torch.randn(6, 2), torch.arange(6)
    with pytest.raises(ValueError, match="one k"):
        over([(rows, ids)], 3).merge(over([(rows, ids)], 2))
    with pytest.raises(ValueError, match="width"):
        over([(rows, ids)], 3).merge(over([(torch.randn(6, 3), ids)], 3))
    with pytest.raises(ValueError, match="width"):
        TopK(3).update(over([(rows, ids)], 3), [torch.randn(6, 3)], ids)
    with pytest.raises(ValueError, match="shapes"):
        TopK(3).init([torch.randn(2, 6, 2)], ids)
