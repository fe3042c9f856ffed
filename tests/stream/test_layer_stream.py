"""Rows of several layers leave a model together: the same samples, in order, without pads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdprobe.latent.layer_stream import LayerStreaming, StreamContext
from tdprobe.stream.batch import Batch
from tdprobe.stream.call import Call
from tdprobe.stream.rows import token_rows
from tdprobe.stream.tokens import TokenClause


class Collecting(StreamContext):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[Batch] = []

    def consume(self, batch: Batch) -> None:
        self.batches.append(batch)


class Stream(LayerStreaming):
    _hooking_context_class = Collecting


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


class Tower(nn.Module):
    """Token id t becomes (t, t), then -(t, t); the pool gives one row per sample; everything is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 2)
        self.embed.weight.data = torch.arange(100.0)[:, None].repeat(1, 2)
        self.negate = nn.Linear(2, 2, bias=False)
        self.negate.weight.data = -torch.eye(2)
        self.pool = Pool()
        self.unused = nn.Identity()
        self.fail = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        y = self.negate(x)
        if self.fail:
            raise OSError("broken")
        pooled = self.pool(y)
        x.zero_()
        y.mul_(0)
        return pooled


IDS, MASK = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])


def batches(pattern: str, *calls: Any, model: nn.Module | None = None, **options: Any) -> list[Batch]:
    with Stream(pattern, **options).prepare(model or Tower()) as hooked:
        for call in calls:
            hooked(**call)
    return hooked.hooking_context.batches


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{"skip_first": 1}, {"skip_first": 0}])
@pytest.mark.parametrize("masked", [True, False])
def test_layers_give_the_same_tokens_as_they_were_when_they_left(masked: bool, options: Any, mode: Any) -> None:
    model = Tower().requires_grad_(False)
    call = {"input_ids": IDS, "attention_mask": MASK} if masked else {"input_ids": IDS}
    with mode():
        (got,) = batches("embed|negate", call, model=model, **options)
    lengths = (3, 2 if masked else 3)
    wanted = [int(t) for row, n in zip(IDS, lengths, strict=True) for t in row[options["skip_first"] : n]]
    assert list(got.rows) == ["embed", "negate"] and got.n == len(wanted)
    assert got.rows["embed"][:, 0].tolist() == wanted
    assert got.rows["negate"][:, 0].tolist() == [-token for token in wanted]
    assert not any(rows.is_inference() or rows.requires_grad for rows in got.rows.values())


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_one_row_per_sample_lines_up_with_a_layer_that_pools(tokens: str) -> None:
    with torch.no_grad():
        (got,) = batches("embed|pool", {"input_ids": IDS, "attention_mask": MASK}, tokens=tokens, skip_first=0)
    assert got.rows["embed"][:, 0].tolist() == ([5, 7] if tokens == "last" else [4, 6.5])
    assert got.rows["pool"][:, 0].tolist() == [-12, -13]


def test_a_layer_without_token_axis_is_refused_with_its_name() -> None:
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"layer 'pool' gives a value of shape \(2, 2\).*'last'"),
    ):
        batches("", {"input_ids": IDS, "attention_mask": MASK})


def test_a_call_that_fails_leaves_no_rows() -> None:
    model = Tower()
    with torch.no_grad(), Stream("embed").prepare(model) as hooked:
        model.fail = True
        with pytest.raises(OSError, match="broken"):
            hooked(input_ids=IDS)
        model.fail = False
        hooked(input_ids=IDS)
    assert [b.n for b in hooked.hooking_context.batches] == [4]


def test_early_stop_hands_on_the_rows() -> None:
    model = Tower()
    model.fail = True
    (got,) = batches("embed|negate", {"input_ids": IDS}, model=model.requires_grad_(False), early_stop=True)
    assert got.rows["negate"][:, 0].tolist() == [-4, -5, -7, 0]


def test_ids_follow_the_content_through_padding_and_batches() -> None:
    with torch.no_grad():
        together, first, second = batches(
            "embed",
            {"input_ids": IDS, "attention_mask": MASK},
            {"input_ids": IDS[:1]},
            {"input_ids": torch.tensor([[0, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1]])},
        )
    assert together.ids.tolist() == first.ids.tolist() + second.ids.tolist()
    assert len(set(together.ids.tolist())) == 3


def test_ids_may_be_given_and_must_fit_the_batch() -> None:
    with torch.no_grad(), Stream("embed", tokens="last").prepare(Tower()) as hooked:
        context = hooked.hooking_context
        for ids in ([10, 11], [11, 10]):
            context.set_sample_ids(torch.tensor(ids))
            hooked(input_ids=IDS)
        context.set_sample_ids(torch.arange(3))
        with pytest.raises(ValueError, match="3 sample ids were set for a batch of 2 rows"):
            hooked(input_ids=IDS)
    one, two = (b.ids.tolist() for b in context.batches)
    assert one == two[::-1] and len(set(one)) == 2


def test_steps_of_generation_keep_the_number_of_their_text(tiny_llama: nn.Module) -> None:
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def generated(ids: Tensor, mask: Tensor) -> list[list[int]]:
        with Stream(r"model\.layers\.1$", tokens="generated", skip_first=0).prepare(tiny_llama) as hooked:
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            hooked.generate(input_ids=ids, attention_mask=mask, **options)
        return [batch.ids.tolist() for batch in hooked.hooking_context.batches if batch.n]

    together = generated(ids, mask)
    assert [len(step) for step in together] == [2, 2, 2]
    # Steps of different texts at the same position, and of one text at different ones, are different samples.
    assert len({number for step in together for number in step}) == 6
    assert generated(ids[:1, 2:], mask[:1, 2:]) == [step[:1] for step in together]
    same = generated(torch.tensor([[7, 5], [8, 5]]), torch.ones(2, 2))
    assert len({number for step in same for number in step}) == 6


def test_inputs_without_tokens_are_rows_as_they_are() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 3, bias=False))
    x = torch.arange(8.0).reshape(4, 2)
    with torch.no_grad(), Stream(r"\d").prepare(model) as hooked:
        hooked(x)
        hooked(x)
    one, two = hooked.hooking_context.batches
    assert torch.equal(one.rows["0"], x) and torch.equal(one.rows["1"], x @ model[1].weight.T)
    # Without any content to go by, samples are numbered as they come.
    assert len(set(one.ids.tolist()) | set(two.ids.tolist())) == 8


def test_what_runs_outside_of_a_call_of_the_model_is_not_taken() -> None:
    model = Tower().requires_grad_(False)
    with Stream("embed").prepare(model) as hooked:
        model.embed(IDS)
        hooked(input_ids=IDS)
        model.embed(IDS)
    assert len(hooked.hooking_context.batches) == 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_rows_without_tokens_do_not_follow_later_writes(mode: Any) -> None:
    model = nn.Sequential(nn.Identity(), nn.Threshold(9, 9, inplace=True))
    with mode(), Stream("0").prepare(model) as hooked:
        hooked(torch.ones(4, 2) * torch.ones(1))
    (got,) = hooked.hooking_context.batches
    assert got.rows["0"].tolist() == [[1, 1]] * 4 and not got.rows["0"].is_inference()


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((2, 2), "all"), ((2,), "last"), ((2, 12), "all"), ((2, 4, 3), "all"), ((5, 3), "last")],
)
def test_values_that_cannot_be_cut_into_tokens_are_refused(shape: Any, tokens: str) -> None:
    selection = TokenClause(tokens).select(Call((2, 3)))
    with pytest.raises(ValueError, match=r"'layer' gives a value of shape.*2 x 3 tokens"):
        token_rows("layer", torch.zeros(shape), selection)


def test_values_with_batch_and_tokens_in_one_axis_are_cut() -> None:
    values = torch.arange(12.0).reshape(6, 2)
    selection = TokenClause(-1).select(Call((2, 3)))
    assert torch.equal(token_rows("layer", values, selection), values[[2, 5]])
