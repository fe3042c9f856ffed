"""Patching on models whose every value is known."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdprobe.errors import TdprobeError
from tdprobe.latent import ActivationCaching, ActivationPatching, SteeringVectors
from tdprobe.modules import HookedModule

X, Y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[-10.0, 20.0], [30.0, -40.0]])


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Residual(nn.Module):
    """x + a(x) + b(x) with a(x) = 2 x and b(x) = 3 x, so that each module's part shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Scale(2.0), Scale(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x) + self.b(x)


def both(clean: Tensor, other: Tensor, batch: Any = (2,), key: Any = "patched") -> TensorDict:
    td = TensorDict({"input": clean}, batch_size=batch)
    return td.set((*([key] if isinstance(key, str) else key), "input"), other)


def patched(factory: ActivationPatching, td: TensorDict, model: nn.Module | None = None) -> TensorDict:
    with factory.prepare(model or Residual()) as hooked:
        return hooked(td)


def keys(td: TensorDict) -> set[Any]:
    return set(td.keys(include_nested=True, leaves_only=True))


def test_activations_go_from_the_clean_run_into_the_other_one(hooks_of: Any) -> None:
    model, td = Residual(), both(X, Y)
    result = patched(ActivationPatching(["a"]), td, model)
    assert torch.equal(result["output"], X * 6)
    assert torch.equal(result["patched", "output"], Y + 2 * X + 3 * Y)
    assert hooks_of(model) == 0


def test_the_result_is_new_and_the_caller_gets_outputs_only() -> None:
    td = both(X, Y)
    result = patched(ActivationPatching(["a"]), td)
    documented = {"input", "output", ("patched", "input"), ("patched", "output")}
    assert result is not td and keys(result) == keys(td) == documented
    assert torch.equal(td["patched", "output"], result["patched", "output"])


def test_the_cache_is_in_the_result_on_request_and_never_at_the_callers() -> None:
    td = both(X, Y)
    result = patched(ActivationPatching(["a", "b"], clean_intermediate_keys=False), td)
    assert torch.equal(result["_cache", "a"], 2 * X) and torch.equal(result["_cache", "b"], 3 * X)
    assert keys(td) == {"input", "output", ("patched", "input"), ("patched", "output")}


@pytest.mark.parametrize("batch", [(), (2,), (2, 2)])
@pytest.mark.parametrize("key", ["patched", "other", ("deep", "er")])
def test_any_batch_size_and_any_patch_key(batch: Any, key: Any) -> None:
    clean, other = (value.expand(*batch[:-1], *value.shape).clone() for value in (X, Y))
    result = patched(ActivationPatching(["a"], key, clean_intermediate_keys=False), both(clean, other, batch, key))
    path = (key,) if isinstance(key, str) else key
    assert result.batch_size == torch.Size(batch)
    assert torch.equal(result[(*path, "output")], 4 * other + 2 * clean)
    assert torch.equal(result["_cache", "a"], 2 * clean)


def test_patch_fn_gets_the_right_module_and_both_values() -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def patch_fn(*, module_key: str, output: Tensor, output_to_patch: Tensor) -> Tensor | None:
        seen[module_key] = (output, output_to_patch)
        return None if module_key == "a" else output + output_to_patch

    result = patched(ActivationPatching(["a", "b"], patch_fn=patch_fn), both(X, Y))
    assert set(seen) == {"a", "b"}
    assert torch.equal(seen["a"][0], 2 * Y) and torch.equal(seen["a"][1], 2 * X)
    assert torch.equal(seen["b"][0], 3 * Y) and torch.equal(seen["b"][1], 3 * X)
    assert torch.equal(result["patched", "output"], Y + 2 * X + 3 * Y + 3 * X)


@pytest.mark.parametrize("returned", [3, (X,), "text"])
def test_a_patch_fn_that_returns_no_tensor_is_refused(returned: Any) -> None:
    with pytest.raises(RuntimeError, match=f"patch_fn returned a {type(returned).__name__} for 'a'.*Tensor"):
        patched(ActivationPatching(["a"], patch_fn=lambda **_: returned), both(X, Y))


def test_a_patch_fn_that_writes_in_place_leaves_what_is_stored() -> None:
    def spoil(module_key: str, output: Tensor, output_to_patch: Tensor) -> None:
        output_to_patch.zero_()

    with torch.no_grad():
        result = patched(ActivationPatching(["a"], patch_fn=spoil), both(X, Y))
    assert torch.equal(result["patched", "output"], 4 * Y + 2 * X)


def test_a_model_that_writes_in_place_leaves_what_is_stored() -> None:
    model = nn.Sequential(Scale(2.0), nn.ReLU(inplace=True))
    clean = torch.tensor([[-1.0, 1.0]])
    with torch.no_grad():
        result = patched(
            ActivationPatching(["[0]"], clean_intermediate_keys=False), both(clean, clean * 5, (1,)), model
        )
    assert torch.equal(result["_cache", "[0]"], 2 * clean)
    assert result["patched", "output"].tolist() == [[0, 2]]


def test_cache_callback_transforms_what_is_stored_in_both_runs() -> None:
    calls: list[tuple[str, str, set[str]]] = []

    def half(*, module: nn.Module, args: Any, output: Tensor, key: str, direction: str) -> Tensor:
        calls.append((key, direction, {type(module).__name__, type(args).__name__}))
        return output / 2

    result = patched(ActivationPatching(["a"], clean_intermediate_keys=False, cache_callback=half), both(X, Y))
    assert torch.equal(result["patched", "output"], 4 * Y + X)
    assert torch.equal(result["_cache", "a"], X / 2)
    assert calls == [("a", "fwd", {"Scale", "tuple"})] * 2


def test_a_cache_callback_that_lacks_an_argument_is_refused_on_enter(hooks_of: Any) -> None:
    model = Residual()
    with pytest.raises(ValueError, match="lacks the argument"):
        with ActivationPatching(["a"], cache_callback=lambda output, key: output).prepare(model):
            pass
    assert hooks_of(model) == 0


@pytest.mark.parametrize("missing", ["patched", "input"])
def test_missing_inputs_are_a_key_error_and_nothing_is_written(missing: str) -> None:
    td = both(X, Y).exclude(missing)
    before = keys(td)
    with pytest.raises(KeyError, match=missing) as caught:
        with ActivationPatching(["a"], required=False).prepare(Residual(), ["input"]) as hooked:
            hooked(td)
    assert isinstance(caught.value, TdprobeError) and keys(td) == before


def test_two_tensors_in_give_two_tensors_out() -> None:
    with ActivationPatching(["a"]).prepare(Residual()) as hooked:
        clean, other = hooked(X, Y)
        assert torch.equal(clean, 6 * X) and torch.equal(other, 4 * Y + 2 * X)
        assert hooked.in_keys == ["input", ("patched", "input")]
        assert hooked.out_keys == ["output", ("patched", "output")]
        with pytest.raises(RuntimeError, match=r"hooked\.patch\(clean, other\)"):
            hooked(X)


def test_a_tensordict_module_is_patched_by_paths_that_start_with_module() -> None:
    wrapped = TensorDictModule(Residual(), ["x"], ["y"])
    td = TensorDict({"x": X, "patched": {"x": Y}}, batch_size=[2])
    assert torch.equal(patched(ActivationPatching(["module.a"]), td, wrapped)["patched", "y"], 4 * Y + 2 * X)


@pytest.mark.parametrize("paths", ["a", ["a"], ("a",)])
def test_one_path_may_be_a_string(paths: Any) -> None:
    assert torch.equal(patched(ActivationPatching(paths), both(X, Y))["patched", "output"], 4 * Y + 2 * X)


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (["c"], "no c; there is 'a', 'b'"),
        (["a.reset()"], "cannot read the module path"),
        ([], "no module is named"),
        (["a", "<a>"], "'a' and '<a>' lead to the same module"),
        ([3], "a module path is a str"),
    ],
)
def test_bad_paths_are_refused_on_enter(paths: Any, problem: str, hooks_of: Any) -> None:
    model = Residual()
    context = ActivationPatching(paths).prepare(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=problem), context:
            pass
        assert hooks_of(model) == 0 and not context.in_context


def test_a_list_of_modules_never_runs() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([Scale(1.0)])
    with pytest.raises(ValueError, match=r"a ModuleList, which never runs; 'blocks\[:\]' takes"):
        with ActivationPatching(["blocks"]).prepare(model):
            pass


def test_required_false_leaves_out_what_leads_nowhere() -> None:
    result = patched(ActivationPatching(["a", "c"], required=False), both(X, Y))
    assert torch.equal(result["patched", "output"], 4 * Y + 2 * X)


class Sometimes(Residual):
    """Runs b for small inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) if x.abs().max() < 5 else self.a(x)


@pytest.mark.parametrize("path", ["a", "b"])
def test_a_module_that_runs_in_one_of_the_runs_only_is_an_error(path: str) -> None:
    with pytest.raises(RuntimeError, match=f"'{path}' (runs for the 1. time|ran 1 times in the clean run)"):
        patched(ActivationPatching([path]), both(X, Y), Sometimes())


def test_a_module_that_never_runs_is_an_error() -> None:
    model = Residual()
    model.unused = nn.Identity()
    with pytest.raises(RuntimeError, match="nothing was done at 'unused'"):
        patched(ActivationPatching(["a", "unused"]), both(X, Y), model)


class Recurrent(nn.Module):
    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.cell, self.steps = Scale(2.0), steps

    def forward(self, x: Tensor) -> Tensor:
        for step in range(self.steps):
            x = self.cell(x) + step
        return x


def test_occurrence_is_paired_with_occurrence_and_the_clean_run_is_left_alone() -> None:
    model, pairs = Recurrent(), []

    def record(module_key: str, output: Tensor, output_to_patch: Tensor) -> Tensor:
        pairs.append((output.clone(), output_to_patch.clone()))
        return output

    result = patched(ActivationPatching(["cell"], patch_fn=record), both(X, Y), model)
    assert torch.equal(result["output"], model(X)) and torch.equal(result["patched", "output"], model(Y))
    for turn, step in enumerate((lambda x: 2 * x, lambda x: 4 * x, lambda x: 8 * x + 2)):
        assert torch.equal(pairs[turn][0], step(Y)) and torch.equal(pairs[turn][1], step(X))
    assert torch.equal(patched(ActivationPatching(["cell"]), both(X, Y), model)["patched", "output"], model(X))


def test_a_repeated_module_is_paired_in_patch_too_where_the_clean_run_would_end_early() -> None:
    model = Recurrent()
    with ActivationPatching(["cell"]).prepare(model) as hooked:
        assert torch.equal(hooked.patch(X, Y), model(X))


def test_a_run_with_more_occurrences_than_the_clean_one_is_an_error() -> None:
    class Loop(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x.abs().max())):
                x = self.cell(x)
            return x

    clean, other = torch.full((1, 2), 2.0), torch.full((1, 2), 3.0)
    with pytest.raises(RuntimeError, match=r"'cell' runs for the 3\. time.*ran 2 times in the clean"):
        patched(ActivationPatching(["cell"]), both(clean, other, (1,)), Loop())
    result = patched(ActivationPatching(["cell"]), both(other, clean, (1,)), Loop())
    assert result["patched", "output"].tolist() == [[12, 12]]


# Outputs that are no tensor.


class Out(NamedTuple):
    nothing: None
    first: Tensor
    second: Tensor


class Several(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(x)


class Sum(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner, self.types = Several(kind), []

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        self.types.append(type(out))
        _, first, second = out.values() if isinstance(out, dict) else out
        return first + 10 * second


KINDS = [
    lambda x: (None, x, x * 2),
    lambda x: [None, x, x * 2],
    lambda x: Out(None, x, x * 2),
    lambda x: {"nothing": None, "first": x, "second": x * 2},
]


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_structure_the_first_tensor_is_patched_and_the_rest_stays(kind: Any) -> None:
    model = Sum(kind)
    result = patched(ActivationPatching(["inner"]), both(X, Y), model)
    assert torch.equal(result["patched", "output"], X + 20 * Y)
    assert model.types[0] is model.types[1] is type(kind(X))


def test_a_value_of_another_shape_is_refused() -> None:
    with ActivationPatching(["a"]).prepare(Residual()) as hooked:
        with pytest.raises(ValueError, match=r"\(2, 2\), the module gave \(1, 2\)"):
            hooked.patch(X, Y[:1])
        assert torch.equal(hooked.patch(X, Y), 4 * Y + 2 * X)


def test_an_output_without_a_tensor_is_refused() -> None:
    class Nothing(Residual):
        def forward(self, x: Tensor) -> Tensor:
            self.c(x)
            return x

    model = Nothing()
    model.c = Several(lambda x: "text")
    with pytest.raises(RuntimeError, match="'c' gave a str without any tensor"):
        patched(ActivationPatching(["c"]), both(X, Y), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays_that_of_the_activation(dtype: torch.dtype) -> None:
    model = Residual().to(dtype)
    factory = ActivationPatching(["a"], patch_fn=lambda output_to_patch, **_: output_to_patch.float())
    result = patched(factory, both(X.to(dtype), Y.to(dtype)), model)
    assert result["patched", "output"].dtype == dtype
    assert torch.equal(result["patched", "output"], (4 * Y + 2 * X).to(dtype))


# Tokens.


class Tokens(nn.Module):
    """(batch, tokens) ids to (batch, tokens, 1) values, each token on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(input_ids[..., None].float())


CLEAN = {"input_ids": torch.tensor([[0, 11, 12, 13], [21, 22, 23, 24]]), "attention_mask": torch.ones(2, 4)}
OTHER = {"input_ids": torch.tensor([[51, 52, 53, 0], [61, 62, 63, 64]]), "attention_mask": torch.ones(2, 4)}
CLEAN["attention_mask"][0, 0] = 0
OTHER["attention_mask"][0, 3] = 0


@pytest.mark.parametrize(
    ("tokens", "skip_first", "expected"),
    [
        ("last", 0, [[51, 52, 13, 0], [61, 62, 63, 24]]),
        (0, 0, [[11, 52, 53, 0], [21, 62, 63, 64]]),
        (-2, 0, [[51, 12, 53, 0], [61, 62, 23, 64]]),
        ("all", 0, [[11, 12, 13, 0], [21, 22, 23, 24]]),
        ("all", 1, [[51, 12, 13, 0], [61, 22, 23, 24]]),
        (None, 2, [[51, 52, 13, 0], [61, 62, 23, 24]]),
        ("0:2", 0, [[11, 12, 53, 0], [21, 22, 63, 64]]),
        ([0, -1], 0, [[11, 52, 13, 0], [21, 62, 63, 24]]),
    ],
)
def test_tokens_are_paired_among_the_real_ones(tokens: Any, skip_first: int, expected: Any) -> None:
    factory = ActivationPatching(["layer"], tokens=tokens, skip_first=skip_first)
    with factory.prepare(Tokens()) as hooked:
        assert hooked.patch(CLEAN, OTHER)[..., 0].tolist() == expected
    td = TensorDict({**CLEAN, "patched": OTHER}, batch_size=[2])
    result = patched(factory, td, Tokens())
    assert result["patched", "output"][..., 0].tolist() == expected
    assert torch.equal(result["output"][..., 0], CLEAN["input_ids"].float())


@given(st.data())
def test_left_padding_and_right_padding_patch_the_same_tokens(data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    sides = data.draw(st.lists(st.booleans(), min_size=2, max_size=2))
    tokens = data.draw(st.sampled_from(["last", "all", 0, "0:2", [0, -1]]))

    def batch(base: int, left: bool) -> dict[str, Tensor]:
        ids, mask = torch.zeros(len(lengths), 5, dtype=torch.long), torch.zeros(len(lengths), 5)
        for row, n in enumerate(lengths):
            at = slice(5 - n, 5) if left else slice(0, n)
            ids[row, at], mask[row, at] = base + 10 * row + torch.arange(n), 1
        return {"input_ids": ids, "attention_mask": mask}

    clean, other = batch(100, sides[0]), batch(500, sides[1])
    with ActivationPatching(["layer"], tokens=tokens).prepare(Tokens()) as hooked:
        out = hooked.patch(clean, other)[..., 0]
    for row, n in enumerate(lengths):
        real = out[row][other["attention_mask"][row].bool()]
        chosen = {"last": {n - 1}, "all": set(range(n)), "0:2": {0, 1}}.get(str(tokens), {0})
        chosen = {0, n - 1} if isinstance(tokens, list) else chosen
        expected = [(100 if place in chosen else 500) + 10 * row + place for place in range(n)]
        assert real.tolist() == expected
        assert not out[row][other["attention_mask"][row] == 0].any()


def test_patch_fn_gets_the_rows_of_the_tokens() -> None:
    seen = []

    def patch_fn(module_key: str, output: Tensor, output_to_patch: Tensor) -> Tensor:
        seen.append((output.tolist(), output_to_patch.tolist()))
        return output + output_to_patch

    with ActivationPatching(["layer"], tokens="last", patch_fn=patch_fn).prepare(Tokens()) as hooked:
        out = hooked.patch(CLEAN, OTHER)[..., 0]
    assert seen == [([[53], [64]], [[13], [24]])]
    assert out.tolist() == [[51, 52, 66, 0], [61, 62, 63, 88]]


def test_numbers_of_tokens_that_differ_are_refused() -> None:
    clean = {"input_ids": CLEAN["input_ids"][:, :3], "attention_mask": torch.ones(2, 3)}
    with ActivationPatching(["layer"], tokens="all").prepare(Tokens()) as hooked:
        hooked.patch(CLEAN, OTHER)
        with pytest.raises(ValueError, match="selects 3 tokens of row 1 of the clean input and 4 of the other"):
            hooked.patch(clean, OTHER)


def test_whole_values_of_other_padding_are_refused() -> None:
    with ActivationPatching(["layer"]).prepare(Tokens()) as hooked:
        assert torch.equal(hooked.patch(CLEAN, CLEAN)[..., 0], CLEAN["input_ids"].float())
        with pytest.raises(ValueError, match="pads at different places"):
            hooked.patch(CLEAN, OTHER)


@pytest.mark.parametrize("tokens", ["mean", "generated"])
def test_a_clause_that_is_no_place_to_write_to_is_refused(tokens: str) -> None:
    with pytest.raises(ValueError, match=f"tokens='{tokens}' is no place"):
        ActivationPatching(["layer"], tokens=tokens)


def test_a_clause_that_matches_nothing_is_refused() -> None:
    with ActivationPatching(["layer"], tokens=9, required=False).prepare(Tokens()) as hooked:
        with pytest.raises(ValueError, match="matches no token"):
            hooked.patch(CLEAN, OTHER)


def test_a_bound_key_that_is_missing_on_one_side_is_not_left_to_its_default() -> None:
    td = TensorDict({**CLEAN, "patched": {"input_ids": OTHER["input_ids"]}}, batch_size=[2])
    with pytest.raises(KeyError, match=r"lacks \('patched', 'attention_mask'\)"):
        patched(ActivationPatching(["layer"], required=False), td, Tokens())


# Sweeps.


class Mixed(Tokens):
    """Two layers; the output is 100 x token 0 + 10 x token 1 + token 2, after doubling."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Scale(2.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.second(super().forward(input_ids))
        return (x[:, :3, 0] * torch.tensor([100.0, 10.0, 1.0])).sum(1)


@pytest.mark.parametrize("rows_per_call", [1, 2, 5, 64])
def test_a_sweep_patches_one_module_and_one_token_at_a_time(rows_per_call: int) -> None:
    model, calls = Mixed(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    clean = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    other = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    with ActivationPatching(["layer", "second"]).prepare(model) as hooked:
        found = hooked.sweep(clean, other, lambda out: out, rows_per_call=rows_per_call)
    expected = torch.tensor([[200.0, 40.0, 6.0], [800.0, 100.0, 12.0]])
    assert torch.equal(found, expected.expand(2, 2, 3))
    assert sum(calls[1:]) == 12 and max(calls[1:]) <= rows_per_call and calls[0] == 2
    assert hooked.hooking_context.n_fired.keys() == {"layer", "second"}


def test_a_sweep_keeps_to_the_clause_and_to_real_tokens() -> None:
    factory = ActivationPatching(["layer"], tokens="last")
    with factory.prepare(Tokens()) as hooked:
        found = hooked.sweep(CLEAN, OTHER, lambda out: out.sum((1, 2)))
    total = OTHER["input_ids"].sum(1)
    assert found.isnan().tolist() == [[[True, True, False, True], [True, True, True, False]]]
    assert found[0, 0, 2] == total[0] - 53 + 13 and found[0, 1, 3] == total[1] - 64 + 24


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"metric": lambda out: out.sum()}, r"shape \(8,\) here; got \(\)"),
        ({"metric": lambda out: 1.0}, "got float"),
        ({"rows_per_call": 0}, "rows_per_call counts rows"),
        ({"clean": {"input_ids": CLEAN["input_ids"][:, :3]}}, "3 tokens of row 0"),
    ],
)
def test_a_sweep_says_what_does_not_fit(change: Any, problem: str) -> None:
    ids = {"input_ids": OTHER["input_ids"]}
    given = {"clean": ids, "other": ids, "metric": lambda out: out.sum((1, 2))} | change
    with ActivationPatching(["layer"], required=False).prepare(Tokens()) as hooked:
        with pytest.raises(ValueError, match=problem):
            hooked.sweep(**given)


# Blocks, faults, threads, gradients.


def test_patching_holds_for_every_call_in_its_block_and_no_other() -> None:
    model = Residual()
    with ActivationPatching(["a"]).prepare(model) as hooked:
        assert torch.equal(model(Y), 6 * Y)
        with hooked.patching(X) as inner:
            assert isinstance(inner, HookedModule)
            for _ in range(2):
                assert torch.equal(model(Y), 4 * Y + 2 * X) and torch.equal(hooked(Y), 4 * Y + 2 * X)
        assert torch.equal(model(Y), 6 * Y)


def test_the_clean_run_is_not_kept_alive_after_its_use() -> None:
    with torch.no_grad(), ActivationPatching(["a"]).prepare(Residual()) as hooked:
        for call in (lambda: hooked(both(X, Y)), lambda: hooked.patch(X, Y)):
            call()
            assert not hooked.hooking_context.clean and not hooked.hooking_context.restored


def test_the_clean_run_of_patch_ends_after_the_last_module_that_is_needed() -> None:
    model, ran = nn.Sequential(Scale(1.0), Scale(2.0), Scale(3.0)), []
    model[2].register_forward_hook(lambda *_: ran.append(1))
    with ActivationPatching(["[0]", "[1]"]).prepare(model) as hooked:
        assert torch.equal(hooked.patch(X, Y), 6 * X)
        assert len(ran) == 1
        hooked(both(X, Y))
        assert len(ran) == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "patch_fn", "cache_callback"])
def test_an_error_leaves_the_model_and_the_next_call_right(where: str, error: Any, hooks_of: Any) -> None:
    model, armed = Residual(), [where]

    def fail(place: str) -> None:
        if place in armed:
            raise error(place)

    user = model.b.register_forward_pre_hook(lambda *_: fail("model"))
    factory = ActivationPatching(
        ["a"],
        patch_fn=lambda **_: fail("patch_fn"),
        cache_callback=lambda output, **_: (output, fail("cache_callback"))[0],
    )
    with factory.prepare(model) as hooked:
        with pytest.raises(error, match=where):
            hooked(both(X, Y))
        armed.clear()
        assert torch.equal(model(Y), 6 * Y)
        assert torch.equal(hooked(both(X, Y))["patched", "output"], 4 * Y + 2 * X)
    user.remove()
    assert hooks_of(model) == 0 and torch.equal(model(Y), 6 * Y)


def test_another_thread_is_untouched_and_two_threads_do_not_mix() -> None:
    model, found, barrier = Residual(), {}, threading.Barrier(2)

    def work(scale: float) -> None:
        with ActivationPatching(["a"]).prepare(model) as hooked:
            barrier.wait(5)
            results = [hooked(both(X * scale, Y))["patched", "output"] for _ in range(20)]
            barrier.wait(5)
        found[scale] = all(torch.equal(result, 4 * Y + 2 * X * scale) for result in results)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 7.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {1.0: True, 7.0: True}


def test_gradients_flow_through_both_runs() -> None:
    model = Residual()
    clean, other = X.clone().requires_grad_(), Y.clone().requires_grad_()
    patched(ActivationPatching(["a"]), both(clean, other), model)["patched", "output"].sum().backward()
    assert torch.equal(clean.grad, torch.full_like(X, 2)) and torch.equal(other.grad, torch.full_like(Y, 4))


class Checkpointed(nn.Module):
    """tanh(2 x) ** 2 summed with the input, computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(Scale(2.0), nn.Tanh()), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda value: self.inner(value) ** 2 + value, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("tokens", [None, "0:1"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_patches_act_when_gradient_checkpointing_computes_again(reentrant: bool, tokens: Any) -> None:
    model = Checkpointed(reentrant)
    clean, other = (value.view(1, 2, 2).div(40).requires_grad_() for value in (X.clone(), Y.clone()))
    with ActivationPatching(["inner[0]"], tokens=tokens).prepare(model) as hooked:
        result = hooked(both(clean, other, ()))
        result["patched", "output"].sum().backward()
    new = 2 * (clean if tokens is None else torch.cat([clean[:, :1], other[:, 1:]], 1)).detach()
    taken = torch.ones(1, 2, 1) if tokens is None else torch.tensor([[[1.0], [0.0]]])
    slope = 2 * new.tanh() * (1 - new.tanh() ** 2) * 2
    torch.testing.assert_close(other.grad, 1 + slope * (1 - taken))
    # The reentrant kind computes without a graph first, so there is none through what was stored.
    if not reentrant:
        torch.testing.assert_close(clean.grad, slope * taken)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda factory: pickle.loads(pickle.dumps(factory))])  # noqa: S301
def test_a_factory_is_a_value(copied: Any) -> None:
    factory = copied(ActivationPatching(["layer"], tokens="last"))
    with factory.prepare(Tokens()) as hooked:
        assert hooked.patch(CLEAN, OTHER)[..., 0].tolist() == [[51, 52, 13, 0], [61, 62, 63, 24]]


def test_steering_and_patching_on_one_model() -> None:
    model = Residual()
    steering = SteeringVectors(["a"], lambda module_key, output: output + 1000)
    for first_patch in (True, False):
        contexts = [ActivationPatching(["a"]).prepare(model), steering.prepare(model)]
        contexts = contexts if first_patch else contexts[::-1]
        with contexts[0] as one, contexts[1] as two:
            hooked = one if first_patch else two
            result = hooked(both(X, Y))
        # The clean value is stored and put back at the same place among the interventions.
        assert torch.equal(result["output"], 6 * X + 1000)
        assert torch.equal(result["patched", "output"], 4 * Y + 2 * X + 1000)


@pytest.mark.parametrize("order", [1, -1])
def test_a_cache_sees_the_patched_value_whichever_was_entered_first(order: int) -> None:
    model = Residual()
    contexts = [ActivationPatching(["a"]).prepare(model), ActivationCaching("a").prepare(model)]
    with contexts[::order][0] as one, contexts[::order][1] as two:
        (one if order == 1 else two).patch(X, Y)
    assert torch.equal(contexts[1].cache["a"], 2 * X)


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        result = patched(ActivationPatching(["a"], clean_intermediate_keys=False), both(X, Y))
        assert torch.equal(result["patched", "output"], 4 * Y + 2 * X)
    assert not result["_cache", "a"].is_inference()


def test_a_module_of_a_compiled_model(hooks_of: Any) -> None:
    model = Residual()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(Y), 6 * Y)
    with torch.no_grad(), ActivationPatching(["a"]).prepare(compiled) as hooked:
        assert torch.equal(hooked.patch(X, Y), 4 * Y + 2 * X)
        assert torch.equal(hooked(both(X, Y))["patched", "output"], 4 * Y + 2 * X)
    assert torch.equal(compiled(Y), 6 * Y) and hooks_of(model) == 0
