"""Modules that run several times, token selection in the cache, and forward passes that end early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdprobe.latent import ActivationCaching

X = torch.tensor([[1.0, 2.0]])


class Tied(nn.Module):
    """One doubling layer, used three times on growing inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(2, 2, bias=False)
        self.twice.weight.data = 2 * torch.eye(2)
        self.last = nn.Identity()

    def forward(self, x: Tensor, grow: bool = False) -> Tensor:
        for _ in range(3):
            x = self.twice(x)
            x = torch.cat([x, x]) if grow else x
        return self.last(x)


def test_the_last_run_is_cached_by_default() -> None:
    with ActivationCaching("twice").prepare(Tied()) as hooked:
        hooked(X)
    context = hooked.hooking_context
    assert torch.equal(context.cache["twice"], X * 8)
    assert context.n_fired == {"twice": 3} and context.occurrences == {}
    with pytest.raises(ValueError, match="'twice' cannot be stacked: there are none.*occurrences='all'"):
        context.stacked("twice")


def test_every_run_is_kept_on_request() -> None:
    with ActivationCaching("twice", occurrences="all").prepare(Tied()) as hooked:
        hooked(X)
        hooked(X * 10)
    context = hooked.hooking_context
    scales = [2, 4, 8, 20, 40, 80]
    assert torch.equal(context.stacked("twice"), torch.stack([X * scale for scale in scales]))
    assert torch.equal(context.cache["twice"], X * 80)
    context.clear()
    assert context.occurrences == {} and context.phases == {}


def test_runs_of_different_shapes_stay_a_list() -> None:
    with ActivationCaching("twice", occurrences="all").prepare(Tied()) as hooked:
        hooked(x=X, grow=True)
    context = hooked.hooking_context
    assert [v.shape[0] for v in context.occurrences["twice"]] == [1, 2, 4]
    with pytest.raises(ValueError, match=r"shapes are \[\(1, 2\), \(2, 2\), \(4, 2\)\]"):
        context.stacked("twice")


def test_entering_again_forgets_earlier_runs_unless_the_cache_is_kept() -> None:
    for clear, count in ((True, 3), (False, 6)):
        context = ActivationCaching("twice", occurrences="all", clear_cache=clear).prepare(Tied())
        for _ in range(2):
            with context as hooked:
                hooked(X)
        assert len(context.occurrences["twice"]) == count


def test_gradients_of_repeated_runs_are_kept_in_the_order_of_backward() -> None:
    factory = ActivationCaching("twice", directions=["bwd"], occurrences="all")
    with factory.prepare(Tied()) as hooked:
        hooked(X.clone().requires_grad_()).sum().backward()
    values = hooked.hooking_context.stacked("twice")
    assert values[:, 0].tolist() == [[1, 1], [2, 2], [4, 4]]


# Token selection. Token t is embedded as (t, 10 t).


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.arange(50.0)[:, None] * torch.tensor([1.0, 10.0]))
        self.attend = nn.Linear(2, 2)
        self.pool = nn.Linear(2, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.pool(self.attend(self.embed(input_ids)).mean(1))


IDS = torch.tensor([[7, 8, 9, 0], [1, 2, 3, 4]])
RIGHT, LEFT = torch.tensor([[1, 1, 1, 0], [1] * 4]), torch.tensor([[0, 1, 1, 1], [1] * 4])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("tokens", "skip", "chosen"),
    [
        (0, 0, [7, 1]),
        ("last", 0, [9, 4]),
        ("all", 0, [7, 8, 9, 1, 2, 3, 4]),
        (None, 2, [9, 3, 4]),
        ("mean", 1, [8.5, 3]),
        ([0, -1], 0, [7, 9, 1, 4]),
        (torch.tensor([[True] * 4, [False, True, False, False]]), 0, [7, 8, 9, 2]),
    ],
)
def test_selected_tokens_are_cached_as_rows(tokens: Any, skip: int, chosen: list[float], side: str) -> None:
    ids, mask = (IDS, RIGHT) if side == "right" else (IDS[:, [3, 0, 1, 2]], LEFT)
    if side == "left":
        ids = torch.stack([ids[0], IDS[1]])
    with ActivationCaching("embed|attend", tokens=tokens, skip_first=skip).prepare(Embedded()) as hooked:
        hooked(input_ids=ids, attention_mask=mask)
    rows = hooked.hooking_context.cache["embed"]
    assert rows.tolist() == [[t, 10 * t] for t in chosen]


@pytest.mark.parametrize("direction", ["fwd", "fwd_pre"])
def test_tokens_of_inputs_and_of_what_a_callback_returns(direction: Any) -> None:
    def callback(**given: Any) -> Tensor:
        return (given["args"][0] if direction == "fwd_pre" else given["output"]) * 2

    values, model = [], Embedded()
    for back in (None, callback):
        factory = ActivationCaching("attend", tokens="last", directions=[direction], callback=back)
        with factory.prepare(model) as hooked:
            hooked(input_ids=IDS, attention_mask=RIGHT)
        values.append(hooked.hooking_context.cache["attend"])
    assert torch.equal(values[1], values[0] * 2)
    if direction == "fwd_pre":
        assert values[0].tolist() == [[9, 90], [4, 40]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_mean_is_cached_in_the_dtype_of_the_activation(dtype: Any) -> None:
    with ActivationCaching("embed", tokens="mean").prepare(Embedded().to(dtype)) as hooked:
        hooked(input_ids=IDS, attention_mask=RIGHT)
    rows = hooked.hooking_context.cache["embed"]
    assert rows.dtype == dtype and rows.tolist() == [[8, 80], [2.5, 25]]


def test_a_value_without_token_axis_is_not_cut_into_nonsense() -> None:
    # (2, 4) could be reshaped to 2 x 4 tokens of width 1.
    with pytest.raises(ValueError, match=r"'pool' gives a value of shape \(2, 4\), which has no token axis"):
        with ActivationCaching("pool", tokens="all").prepare(Embedded()) as hooked:
            hooked(input_ids=IDS, attention_mask=RIGHT)


def test_a_module_called_on_its_own_has_no_tokens_to_select_from() -> None:
    model = Embedded()
    with ActivationCaching("attend", tokens="last", required=False).prepare(model) as hooked:
        hooked(input_ids=IDS, attention_mask=RIGHT)
        with pytest.raises(RuntimeError, match="prepare that module instead"):
            model.attend(torch.ones(2, 4, 2))
    with ActivationCaching("embed", tokens="last", early_stop=True).prepare(model) as hooked:
        hooked(input_ids=IDS, attention_mask=RIGHT)
        with pytest.raises(RuntimeError, match="prepare that module instead"):
            model.embed(IDS)
