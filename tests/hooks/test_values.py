"""Finding the tensor in what flows through a hook, and putting one back."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.hooks import first_tensor, keep, lazy_copy, replace_first_tensor

A, B, NEW = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([7.0, 8.0])


class Point(NamedTuple):
    name: str
    value: Tensor


@dataclass(frozen=True)
class Frozen:
    label: str
    value: Tensor
    derived: int = field(init=False, default=3)


class Counting(defaultdict[str, Any]):
    pass


def output() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return BaseModelOutputWithPast(last_hidden_state=A, hidden_states=(B,))


WRAPPED: dict[str, Any] = {
    "tensor": lambda: A,
    "tuple": lambda: (None, A, B),
    "list": lambda: ["x", [A], B],
    "nested": lambda: ((), {"k": (None, A)}, B),
    "named tuple": lambda: Point("p", A),
    "dict": lambda: {"a": None, "b": A, "c": B},
    "ordered": lambda: OrderedDict(z=A, a=B),
    "defaultdict": lambda: Counting(int, {"b": A, "c": B}),
    "user dict": lambda: UserDict(b=A, c=B),
    "dataclass": lambda: Frozen("p", A),
    "structseq": lambda: torch.return_types.max((A, torch.zeros(2).long())),
    "model output": output,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_first_tensor_is_found_and_replaced_in_the_same_structure(kind: str) -> None:
    value = WRAPPED[kind]()
    assert first_tensor(value) is A
    rebuilt = replace_first_tensor(value, NEW)
    assert type(rebuilt) is type(value)
    assert first_tensor(rebuilt) is NEW and first_tensor(value) is A
    # Putting the old one back gives what was there: nothing else was touched or lost.
    assert repr(replace_first_tensor(rebuilt, A)) == repr(value)


def test_a_model_output_stays_in_step_with_its_attributes() -> None:
    rebuilt = replace_first_tensor(output(), NEW)
    assert rebuilt["last_hidden_state"] is NEW and rebuilt.last_hidden_state is NEW and rebuilt[0] is NEW
    assert rebuilt.hidden_states == (B,) and list(rebuilt) == ["last_hidden_state", "hidden_states"]


def test_the_same_tensor_in_two_places_is_replaced_in_the_first_only() -> None:
    assert replace_first_tensor((A, [A]), NEW) == (NEW, [A])


leaves = st.sampled_from([None, 1, "text", A, B])
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner), max_leaves=8)


@given(trees)
def test_the_order_is_depth_first(tree: Any) -> None:
    def flat(node: Any) -> list[Any]:
        return [x for part in node for x in flat(part)] if isinstance(node, (list, tuple)) else [node]

    tensors = [leaf for leaf in flat(tree) if isinstance(leaf, Tensor)]
    assert first_tensor(tree) is (tensors[0] if tensors else None)
    if tensors:
        after = [leaf for leaf in flat(replace_first_tensor(tree, NEW)) if isinstance(leaf, Tensor)]
        assert all(x is y for x, y in zip(after, [NEW, *tensors[1:]], strict=True))


@pytest.mark.parametrize("value", [None, 3, "text", (), [None], {}, Frozen])
def test_there_may_be_no_tensor(value: Any) -> None:
    assert first_tensor(value) is None
    with pytest.raises(ValueError, match="no tensor"):
        replace_first_tensor(value, NEW)


def test_a_new_value_must_have_the_shape_of_the_old_one() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), the module gave \(2,\)"):
        replace_first_tensor((A,), torch.zeros(3))


@pytest.mark.parametrize("side", ["original", "copy"])
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x[:, 1], lambda x: x.t(), lambda x: x[:1].expand(3, 4)])
def test_a_lazy_copy_is_independent_of_the_original(side: str, make: Any) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensor = make(base)
    before = tensor.clone()
    copied = lazy_copy(tensor)
    assert torch.equal(copied, before) and copied.dtype == tensor.dtype
    if side == "original":
        base.add_(100)
        assert torch.equal(copied, before)
    elif not any(stride == 0 for stride in copied.stride()):
        copied.add_(100)
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("make", [lambda: nn.Parameter(A.clone()), lambda: TensorDict({"a": A.clone()})])
def test_what_is_kept_of_parameters_and_tensordicts_is_independent(make: Any) -> None:
    value = make()
    kept = keep(value)
    with torch.no_grad():
        (value["a"] if isinstance(value, TensorDict) else value).zero_()
    assert torch.equal(kept["a"] if isinstance(kept, TensorDict) else kept, A)


@pytest.mark.parametrize(("columns", "copied"), [(1, True), (4, True), (9, False), (10, False)])
def test_only_small_parts_of_large_storages_are_copied(columns: int, copied: bool) -> None:
    whole = torch.arange(50.0).view(5, 10)
    part = keep(whole[:, :columns])
    assert torch.equal(part, whole[:, :columns])
    assert (part.untyped_storage().nbytes() == 5 * columns * 4) is (copied or columns == 10)
