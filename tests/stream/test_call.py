"""What the arguments of a forward pass say about its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdprobe.stream.call import Call, CallReader


class Config:
    pad_token_id = 0


class Model(nn.Module):
    config = Config()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
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


@pytest.mark.parametrize(("length", "phase"), [(0, "prompt"), (4, "generated")])
def test_the_phase_is_read_off_the_cache(length: int, phase: str) -> None:
    mask = torch.ones(2, length + 1)
    call = read((), {"input_ids": IDS[:, :1], "attention_mask": mask, "past_key_values": Cache(length)})
    assert call.phase == phase and call.continues
    assert call.positions.tolist() == [[length]] * 2
    assert read((), {"input_ids": IDS[:, :1], "past_key_values": Cache(length)}).positions.tolist() == [[length]] * 2


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


def test_a_mask_of_four_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(batch, tokens\), got \(2, 1, 3, 3\)"):
        _ = Call((2, 3), torch.ones(2, 1, 3, 3)).valid
