"""What the arguments of a forward pass say about its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdprobe.stream.call import CallReader
from tdprobe.stream.tokens import TokenClause


class Config:
    pad_token_id = 0


class Model(nn.Module):
    config = Config()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> None: ...


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> Tensor:
        return torch.tensor(self.length)


IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
read = CallReader(Model()).read


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((IDS, MASK), {}),
        ((IDS,), {"attention_mask": MASK}),
        ((), {"attention_mask": MASK, "input_ids": IDS}),
        ((), {"attention_mask": MASK.bool(), "input_ids": IDS, "labels": IDS}),
    ],
)
def test_ids_and_mask_are_found_by_place_or_name(args: Any, kwargs: Any) -> None:
    call = read(args, kwargs)
    assert call.shape == (2, 3) and call.input_ids is IDS and call.phase == "prompt" and not call.continues
    assert call.positions.tolist() == [[0, 1, 2], [0, 1, -1]] and call.lengths.tolist() == [3, 2]


def test_left_padding_counts_from_the_first_real_token() -> None:
    call = read((IDS, MASK.flip(1)), {})
    assert call.positions.tolist() == [[0, 1, 2], [-1, 0, 1]]


def test_embeddings_and_sequences_of_vectors_have_a_token_axis() -> None:
    assert read((), {"inputs_embeds": torch.zeros(2, 3, 4), "attention_mask": MASK}).lengths.tolist() == [
        3,
        2,
    ]
    assert CallReader(nn.Linear(4, 4)).read((torch.zeros(2, 3, 4),), {}).shape == (2, 3)


@pytest.mark.parametrize("value", [torch.zeros(5, 4), torch.zeros(5), torch.zeros(5, 3, 8, 8), None, "text"])
def test_other_inputs_have_none(value: Any) -> None:
    call = CallReader(nn.Linear(4, 4)).read((value,), {})
    assert call.shape is None
    with pytest.raises(ValueError, match="no token axis"):
        _ = call.positions


def test_a_bare_tensor_of_integers_is_ids() -> None:
    call = CallReader(nn.Embedding(10, 4)).read((IDS,), {})
    assert call.shape == (2, 3) and call.input_ids is IDS


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize(("length", "phase"), [(0, "prompt"), (4, "generated")])
def test_the_phase_is_read_off_the_cache(length: int, phase: str, name: str) -> None:
    """transformers has renamed the argument, and a batch of one text comes without a mask."""
    step = {"input_ids": IDS[:, :1], name: Cache(length)}
    for mask in ({"attention_mask": torch.ones(2, length + 1)}, {}):
        call = read((), step | mask)
        assert call.phase == phase and call.continues
        assert call.positions.tolist() == [[length]] * 2


@pytest.mark.parametrize(
    "ids",
    [
        [[5, 6, 7], [8, 9, 0]],
        [[5, 6, 7], [0, 8, 9]],
        [[5, 0, 0], [8, 9, 0]],
        [[0, 0, 5], [0, 6, 7]],
    ],
)
def test_a_batch_that_looks_padded_but_has_no_mask_is_refused(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"pad tokens \(id 0\).*pass attention_mask"):
        _ = read((torch.tensor(ids),), {}).valid


@pytest.mark.parametrize("ids", [[[5, 6, 7], [8, 9, 1]], [[5, 6, 0], [7, 8, 0]], [[5, 6, 0]], [[5, 0, 6], [7, 8, 9]]])
def test_without_a_mask_all_tokens_are_real_where_nothing_looks_padded(ids: Any) -> None:
    assert bool(read((torch.tensor(ids),), {}).valid.all())


def by_pairs(mask: Tensor, tokens: int, places: int) -> Tensor:
    """Spell out which place each token attends to: the real ones up to its own."""
    batch, seen = mask.shape
    pairs = torch.zeros(batch, 1, tokens, places, dtype=torch.bool)
    for row in range(batch):
        for token in range(tokens):
            for place in range(seen - tokens + token + 1):
                pairs[row, 0, token, place] = bool(mask[row, place])
    return pairs


@pytest.mark.parametrize("kind", ["bool", "additive", "by layer"])
@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("side", [1, -1])
def test_the_mask_of_a_cache_of_fixed_size_tells_the_padding(kind: str, past: int, side: int) -> None:
    mask = (
        torch.cat([MASK.new_ones(2, past), MASK], 1)
        if side == 1
        else torch.cat([MASK.flip(1), MASK[:1, :past].expand(2, -1)], 1)
    )
    pairs = by_pairs(mask, 3, 8)
    if kind != "bool":
        pairs = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    given = {"sliding_attention": pairs[..., :1], "full_attention": pairs} if kind == "by layer" else pairs
    plain, call = (read((IDS, form), {"cache": Cache(past)}) for form in (mask, given))
    assert call.positions.tolist() == plain.positions.tolist() and call.lengths.tolist() == plain.lengths.tolist()


WINDOW = torch.ones(2, 1, 3, 3).tril().triu(-1)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (WINDOW.bool(), r"\(2, 1, 3, 3\)"),
        (torch.ones(2, 1, 3, 3), r"\(2, 1, 3, 3\)"),
        ({"sliding_attention": WINDOW.bool()}, "a dict"),
        (object(), "a object"),
    ],
)
def test_a_mask_that_does_not_tell_the_padding_is_refused(mask: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"\(batch, tokens\), got {got}.*tokenizer's attention_mask"):
        _ = read((IDS, mask), {}).valid


@pytest.mark.parametrize("shape", [(3, 3), (2, 2), (4, 3)])
def test_a_mask_of_another_batch_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"has shape \({shape[0]}, {shape[1]}\) for a batch of 2 x 3 tokens"):
        _ = read((IDS, torch.ones(shape)), {}).valid


@pytest.mark.parametrize("form", [MASK[1:], by_pairs(MASK[1:], 3, 3)])
def test_a_mask_of_one_row_stands_for_all_texts(form: Tensor) -> None:
    call = read((IDS, form), {})
    assert call.positions.tolist() == [[0, 1, -1]] * 2 and call.lengths.tolist() == [2, 2]
    taken = TokenClause("last").select(call).take(torch.arange(12.0).view(2, 3, 2))
    assert taken.tolist() == [[2, 3], [8, 9]]
