"""A text keeps its number in any batch, under any padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tdprobe.stream.call import Call
from tdprobe.stream.ids import content_ids, row_ids
from tdprobe.stream.tokens import TokenClause

texts = st.lists(st.integers(0, 50000), min_size=1, max_size=6)


def numbers(rows: list[list[int]], side: str, width: int, fill: int = 0) -> list[int]:
    pads = [width - len(row) for row in rows]
    ids = [row + [fill] * n if side == "right" else [fill] * n + row for row, n in zip(rows, pads, strict=True)]
    ones = [
        [1] * len(row) + [0] * n if side == "right" else [0] * n + [1] * len(row)
        for row, n in zip(rows, pads, strict=True)
    ]
    found = content_ids(Call((len(rows), width), torch.tensor(ones), torch.tensor(ids)))
    assert found is not None and found.dtype == torch.int64
    return found.tolist()


@given(st.lists(texts, min_size=1, max_size=4), st.integers(6, 9), st.integers(0, 9))
def test_padding_and_company_do_not_count(rows: list[list[int]], width: int, fill: int) -> None:
    alone = [numbers([row], "right", len(row))[0] for row in rows]
    assert numbers(rows, "right", width, fill) == alone
    assert numbers(rows, "left", width, fill) == alone


@given(st.lists(texts, min_size=2, max_size=4, unique_by=tuple))
def test_different_texts_have_different_numbers(rows: list[list[int]]) -> None:
    assert len(set(numbers(rows, "right", 6))) == len(rows)


def test_the_order_of_tokens_counts() -> None:
    assert len(set(numbers([[1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 2, 3, 0], [0, 1, 2, 3]], "right", 4))) == 5


def test_a_call_without_token_ids_has_no_content() -> None:
    assert content_ids(Call((2, 3))) is None


@given(st.lists(texts, min_size=1, max_size=3, unique_by=tuple))
def test_every_selected_row_has_a_number_of_its_own_that_padding_does_not_change(
    rows: list[list[int]],
) -> None:
    found = []
    for side in ("right", "left"):
        pads = [6 - len(row) for row in rows]
        mask = torch.tensor([[1] * len(row) + [0] * n for row, n in zip(rows, pads, strict=True)])
        mask = mask if side == "right" else mask.flip(1)
        chosen = TokenClause("all").select(Call((len(rows), 6), mask))
        found.append(row_ids(torch.arange(len(rows)) * 1000, chosen).tolist())
    assert found[0] == found[1] and len(set(found[0])) == sum(map(len, rows))
