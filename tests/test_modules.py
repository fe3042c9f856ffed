"""What goes into a hooked module and what comes out: TensorDicts, tensors, encodings, keywords."""

from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdprobe.latent import ActivationCaching
from tdprobe.modules import HookedModule, user_model

A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])


class Sub(nn.Module):
    """first - second, so that the order of inputs shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.answer = 42

    def forward(self, first: Tensor, second: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return self.inner((first - second if second is not None else first) * scale)

    def generate(self, start: float) -> Tensor:
        return self(torch.full((1, 2), start))


def hooked_call(model: nn.Module, *args: Any, keys: Any = None, out: Any = None, **kwargs: Any) -> Any:
    with ActivationCaching("", required=False).prepare(model, keys, out) as hooked:
        return hooked(*args, **kwargs)


@pytest.mark.parametrize(
    ("keys", "td"),
    [
        (["a", "b"], {"a": A, "b": B}),
        ([("x", "a"), "b"], {"x": {"a": A}, "b": B}),
        ({"first": "a", "second": "b"}, {"a": A, "b": B}),
        ({"second": "b", "first": ("x", "a")}, {"x": {"a": A}, "b": B}),
    ],
)
def test_the_same_tensordict_comes_back_with_the_output(keys: Any, td: Any) -> None:
    given = TensorDict(td, batch_size=[1])
    before = set(given.keys(include_nested=True, leaves_only=True))
    result = hooked_call(Sub(), given, keys=keys)
    assert result is given
    assert torch.equal(given["output"], A - B)
    assert set(given.keys(include_nested=True, leaves_only=True)) == before | {"output"}


def test_out_keys_may_be_named_and_nested() -> None:
    td = hooked_call(Sub(), TensorDict({"a": A}), keys=["a"], out=[("result", "y")])
    assert torch.equal(td["result", "y"], A)


def test_default_keys_are_input_and_output() -> None:
    with ActivationCaching("inner").prepare(Sub()) as hooked:
        assert (hooked.in_keys, hooked.out_keys) == (["input"], ["output"])
        assert torch.equal(hooked(TensorDict({"input": A}))["output"], A)
        assert torch.equal(hooked(A), A)
        assert torch.equal(hooked(input=A), A)


@pytest.mark.parametrize(
    ("keys", "args", "kwargs"),
    [
        (["a", "b"], (A, B), {}),
        (["a", "b"], (), {"a": A, "b": B}),
        ({"first": "a", "second": "b"}, (A, B), {}),
        (None, (A, B), {}),
        (None, (), {"second": B, "first": A}),
        (None, (A,), {"second": B}),
        (None, ({"first": A, "second": B},), {}),
        (None, (UserDict(first=A, second=B),), {}),
    ],
)
def test_tensors_in_give_the_tensor_out(keys: Any, args: Any, kwargs: Any) -> None:
    result = hooked_call(Sub(), *args, keys=keys, **kwargs)
    assert type(result) is Tensor and torch.equal(result, A - B)


def test_other_arguments_of_forward_go_through() -> None:
    assert torch.equal(hooked_call(Sub(), first=A, scale=3.0), A * 3)


class OneDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"] * 2


def test_a_model_that_takes_a_dict_gets_it() -> None:
    assert torch.equal(hooked_call(OneDict(), {"x": A}), A * 2)


class Named(NamedTuple):
    low: Tensor
    high: Tensor


class Several(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(x, x * 2)


@pytest.mark.parametrize("kind", [lambda *v: v, lambda *v: list(v), Named, lambda a, b: {"low": a, "high": b}])
def test_several_outputs_are_written_to_several_keys(kind: Any) -> None:
    td = hooked_call(Several(kind), TensorDict({"x": A}), keys=["x"], out=["low", "high"])
    assert torch.equal(td["low"], A) and torch.equal(td["high"], A * 2)


@pytest.mark.parametrize("kind", [lambda *v: v, lambda a, b: {"low": a, "high": b}, lambda a, b: (None, [a, b])])
def test_one_key_takes_the_first_tensor(kind: Any) -> None:
    td = hooked_call(Several(kind), TensorDict({"x": A}), keys=["x"], out=["y"])
    assert torch.equal(td["y"], A) and set(td.keys()) == {"x", "y"}


@pytest.mark.parametrize(
    ("out", "problem"),
    [(["a", "b", "c"], "2 outputs for the 3 out_keys"), ([("a", "b"), "c", "d"], "2 outputs")],
)
def test_outputs_that_do_not_fit_the_keys_are_refused(out: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        hooked_call(Several(lambda *v: v), TensorDict({"x": A}), keys=["x"], out=out)


def test_a_missing_key_is_named_with_those_present() -> None:
    with pytest.raises(KeyError, match=r"lacks 'b'; it has 'a', \('x', 'c'\)"):
        hooked_call(Sub(), TensorDict({"a": A, "x": {"c": B}}), keys=["a", "b"])


@pytest.mark.parametrize("way", ["keyword", "dict", "tensordict"])
def test_a_name_that_forward_lacks_is_refused_with_close_names(way: str) -> None:
    given = {"frist": A, "second": B}
    with pytest.raises(ValueError, match=r"Sub takes no 'frist' \(did you mean 'first'\?\)"):
        if way == "keyword":
            hooked_call(Sub(), **given)
        else:
            hooked_call(Sub(), given if way == "dict" else TensorDict({"frist": A}))


def test_attributes_are_the_models_own() -> None:
    model = Sub()
    with ActivationCaching("inner").prepare(model) as hooked:
        assert hooked.answer == 42
        assert torch.equal(hooked.generate(3.0), torch.full((1, 2), 3.0))
        assert hooked.hooking_context.n_fired == {"inner": 1}
        assert isinstance(hooked, HookedModule) and isinstance(hooked, nn.Module)
        assert hooked.relative_path == "td_module.module"
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = hooked.no_such_thing


def test_the_users_model_is_called_as_it_is_and_never_wrapped() -> None:
    model = Sub()
    before, parts = type(model), [id(part) for part in model.modules()]
    with ActivationCaching("inner").prepare(model) as hooked:
        hooked(A)
        assert user_model(hooked.td_module) is model
    assert type(model) is before and [id(part) for part in model.modules()] == parts


def test_a_tensordict_module_is_taken_as_it_is() -> None:
    wrapped = TensorDictModule(Sub(), ["a", "b"], ["y"])
    with ActivationCaching("module.inner").prepare(wrapped) as hooked:
        assert hooked.td_module is wrapped and (hooked.in_keys, hooked.out_keys) == (["a", "b"], ["y"])
        td = TensorDict({"a": A, "b": B}, batch_size=[1])
        assert hooked(td) is td and torch.equal(td["y"], A - B)
        assert torch.equal(hooked(A, B), A - B)
        assert torch.equal(hooked(a=A, b=B), A - B)
        assert hooked.relative_path == "td_module"


# GPT-2 takes its cache as the second argument by position, so keys must be bound by name.


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


IDS, MASK = torch.tensor([[5, 3, 9, 0], [1, 2, 3, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("keys", [None, ["input_ids", "attention_mask"], {"attention_mask": "m", "input_ids": "ids"}])
def test_list_keys_of_gpt2_are_bound_by_name(gpt2: nn.Module, keys: Any) -> None:
    with torch.no_grad():
        expected = gpt2(input_ids=IDS, attention_mask=MASK).logits
        td = TensorDict({"input_ids": IDS, "attention_mask": MASK, "ids": IDS, "m": MASK}, batch_size=[2])
        td = td if isinstance(keys, dict) else td.exclude("ids", "m")
        assert hooked_call(gpt2, td, keys=keys) is td
    assert torch.equal(td["output"], expected)


def test_a_keyword_call_gives_the_models_own_output(gpt2: nn.Module) -> None:
    with torch.no_grad():
        expected = gpt2(input_ids=IDS, attention_mask=MASK)
        for args, kwargs in [
            ((), {"input_ids": IDS, "attention_mask": MASK}),
            (({"input_ids": IDS, "attention_mask": MASK},), {}),
            ((IDS,), {"attention_mask": MASK}),
        ]:
            result = hooked_call(gpt2, *args, keys=["input_ids"], **kwargs)
            assert type(result) is type(expected) and torch.equal(result.logits, expected.logits)
        result = hooked_call(gpt2, input_ids=IDS, attention_mask=MASK, use_cache=False)
        assert not any(name in result for name in ("cache", "past_key_values"))


def test_out_keys_may_name_fields_of_a_model_output(gpt2: nn.Module) -> None:
    td = TensorDict({"input_ids": IDS, "labels": IDS}, batch_size=[])
    with torch.no_grad():
        hooked_call(gpt2, td, keys=["input_ids", "labels"], out=["loss", "logits"])
        expected = gpt2(input_ids=IDS, labels=IDS)
    assert torch.equal(td["loss"], expected.loss) and torch.equal(td["logits"], expected.logits)
    with pytest.raises(ValueError, match=r"out_keys \['lgits', 'loss'\].*logits"):
        hooked_call(gpt2, td, keys=["input_ids", "labels"], out=["lgits", "loss"])


@pytest.mark.parametrize("name", ["input_id", "atention_mask"])
def test_an_unknown_encoding_key_names_close_ones(gpt2: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' \(did you mean '(input_ids|attention_mask)'"):
        hooked_call(gpt2, {"input_ids": IDS, name: MASK})


def test_a_key_that_looks_like_a_slip_is_not_left_out_in_silence(gpt2: nn.Module) -> None:
    with pytest.warns(UserWarning, match="'atention_mask' is not given to the model; did you mean 'attention_mask'"):
        hooked_call(gpt2, TensorDict({"input_ids": IDS, "atention_mask": MASK, "score": A}))
