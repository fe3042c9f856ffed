"""Steering on models whose every value is known."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdprobe.errors import TdprobeError
from tdprobe.latent import ActivationCaching, SteeringVectors
from tdprobe.latent.steering_vectors import SteeringDirection

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
V = torch.tensor([10.0, -20.0])


def chain() -> nn.Sequential:
    """Three layers that double, add one and negate."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for layer, scale, shift in zip(model, (2, 1, -1), (0, 1, 0), strict=True):
        layer.weight.data, layer.bias.data = scale * torch.eye(2), torch.full((2,), float(shift))
    return model


def steered(factory: SteeringVectors, x: Any = X, model: nn.Module | None = None) -> Any:
    with factory.prepare(model or chain()) as hooked:
        return hooked(x)


def negate(module_key: str, output: Tensor) -> Tensor:
    return -output


# steer_fn.


def test_steer_fn_is_called_by_keyword_with_the_right_module() -> None:
    seen = {}

    def steer(*, module_key: str, output: Tensor) -> Tensor | None:
        seen[module_key] = output.clone()
        return output + 100 if module_key == "[1]" else None

    assert torch.equal(steered(SteeringVectors(["[0]", "[1]", "[2]"], steer)), -(2 * X + 101))
    assert list(seen) == ["[0]", "[1]", "[2]"]
    assert torch.equal(seen["[0]"], 2 * X) and torch.equal(seen["[2]"], -(2 * X + 101))


def test_a_slice_of_paths_names_each_module() -> None:
    seen = []
    steered(SteeringVectors(["[-2:]"], lambda module_key, output: seen.append(module_key)))
    assert seen == ["[1]", "[2]"]


@pytest.mark.parametrize("returned", [3, (X,), "text"])
def test_a_steer_fn_that_returns_no_tensor_is_refused(returned: Any) -> None:
    with pytest.raises(RuntimeError, match=f"steer_fn returned a {type(returned).__name__} for '1'.*Tensor") as caught:
        steered(SteeringVectors(["1"], lambda **_: returned))
    assert isinstance(caught.value, TdprobeError)


def test_a_steer_fn_that_returns_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\), the module gave \(2, 2\)"):
        steered(SteeringVectors(["1"], lambda output, **_: output[0]))


def test_a_steer_fn_may_write_in_place() -> None:
    def write(module_key: str, output: Tensor) -> None:
        output.mul_(0)

    with torch.no_grad():
        assert torch.equal(steered(SteeringVectors(["1"], write)), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", ["vector", "steer_fn"])
def test_the_dtype_stays_that_of_the_activation(dtype: torch.dtype, way: str) -> None:
    how = {"vector": V} if way == "vector" else {"steer_fn": lambda output, **_: output.float() + V}
    out = steered(SteeringVectors(["[0]"], **how), X.to(dtype), chain().to(dtype))
    assert out.dtype == dtype and torch.equal(out, -(2 * X + V + 1).to(dtype))


# Vectors.


def test_a_vector_is_added_to_every_row_and_the_layer_is_left_alone(hooks_of: Any) -> None:
    model = chain()
    assert torch.equal(steered(SteeringVectors(["[0]"], vector=V, scale=0.5), X, model), -(2 * X + V / 2 + 1))
    assert hooks_of(model) == 0 and torch.equal(model(X), -(2 * X + 1))


@pytest.mark.parametrize("kind", [dict, lambda of: TensorDict(of, batch_size=[])])
def test_one_vector_per_path(kind: Any) -> None:
    vectors = kind({"[0]": V, "1": V * 10})
    assert torch.equal(steered(SteeringVectors(["[0]", "1"], vector=vectors)), -(2 * X + 1 + 11 * V))
    with pytest.raises(ValueError, match=r"unknown module path among the vectors '\[2\]'.*'\[0\]'"):
        steered(SteeringVectors(["[2]"], vector=vectors))


@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 2), (1, 3, 2), (4, 3, 2), (4, 1, 2)])
def test_vectors_broadcast_to_the_activation(shape: tuple[int, ...]) -> None:
    vector, x = torch.randn(shape), torch.randn(4, 3, 2)
    assert torch.equal(steered(SteeringVectors(["0"], vector=vector), x, nn.Sequential(nn.Identity())), x + vector)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 2), (2, 3, 2), (1, 4, 3, 2), (0,)])
def test_a_vector_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"does not fit the activation of shape \(4, 3, 2\) at '0'.*the width, 2"):
        steered(SteeringVectors(["0"], vector=torch.ones(shape)), torch.randn(4, 3, 2), nn.Sequential(nn.Identity()))


@given(st.lists(st.floats(width=32), min_size=4, max_size=4), st.sampled_from([(0.0, 1.0), (-0.0, 1.0), (7.0, 0.0)]))
def test_zero_times_a_vector_is_bit_identical_to_no_hook(values: list[float], how: tuple[float, float]) -> None:
    scale, size = how
    vector = torch.tensor([torch.inf, torch.nan]) if size else torch.zeros(2)
    x = torch.tensor(values).view(2, 2)
    out = steered(SteeringVectors(["0"], vector=vector, scale=scale), x, nn.Sequential(nn.Identity()))
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))


def test_a_vector_can_be_trained() -> None:
    vector = nn.Parameter(torch.zeros(2))
    with SteeringVectors(["[1]"], vector=vector).prepare(chain()) as hooked:
        for _ in range(2):
            hooked(X).sum().backward()
    assert vector.grad.tolist() == [-4, -4]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "neither"),
        ({"steer_fn": negate, "vector": V}, "both"),
        ({"steer_fn": V}, "got a Tensor; see vector="),
        ({"vector": [1.0, 2.0]}, "got a list"),
        ({"vector": V, "tokens": "mean"}, "no place to write to"),
        ({"vector": V, "tokens": "lst"}, "did you mean 'last'"),
        ({"vector": V, "skip_first": -1}, "skip_first"),
    ],
)
def test_bad_arguments_are_refused(given: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SteeringVectors(["0"], **given)


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (["lin"], "has no lin"),
        (["[0].reset_parameters()"], "cannot read"),
        (["[3]"], "3 modules"),
        (["[0:2]", "[1]"], "[1]"),
        ([], "no module is named"),
    ],
)
def test_bad_paths_are_refused_on_enter_and_nothing_stays(paths: Any, problem: str, hooks_of: Any) -> None:
    model = chain()
    context = SteeringVectors(paths, negate).prepare(model)
    if paths == ["[0:2]", "[1]"]:
        # The same name twice is one module.
        with context as hooked:
            assert torch.equal(hooked(X), -(0 - (1 - 2 * X)))
        return
    with pytest.raises(ValueError, match=problem.replace("[", r"\[")), context:
        pass
    assert hooks_of(model) == 0 and not context.in_context


def test_required_false_is_silent_about_paths_and_about_modules_that_never_run() -> None:
    with SteeringVectors(["[0]", "nope"], negate, required=False).prepare(chain()):
        pass


def test_a_module_that_never_runs_is_an_error_even_among_others() -> None:
    model = chain()
    model.forward = lambda x: model[0](x)
    with pytest.raises(RuntimeError, match=r"nothing was done at '\[1\]', '\[2\]'") as caught:
        steered(SteeringVectors(["[0]", "[1]", "[2]"], negate), X, model)
    assert isinstance(caught.value, TdprobeError)


# Structures.


class Out(NamedTuple):
    nothing: None
    first: Tensor
    second: Tensor


@pytest.mark.parametrize(
    "kind", [lambda x: (None, x, x * 2), lambda x: [None, x, x * 2], lambda x: Out(None, x, x * 2)]
)
def test_of_a_structure_the_first_tensor_is_steered(kind: Any) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return kind(x)

    model = nn.Sequential(Several())
    with SteeringVectors(["0"], vector=V).prepare(model):
        out = model(X)
    assert type(out) is type(kind(X)) and out[0] is None
    assert torch.equal(out[1], X + V) and torch.equal(out[2], X * 2)


# Tokens.


class Tokens(nn.Module):
    """(batch, tokens) ids to (batch, tokens, 1) values, each token on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(input_ids[..., None].float())


IDS = torch.tensor([[0, 11, 12, 13], [21, 22, 23, 0]])
MASK = (IDS > 0).long()


@pytest.mark.parametrize(
    ("tokens", "skip_first", "expected"),
    [
        (None, 0, [[100, 111, 112, 113], [121, 122, 123, 100]]),
        ("all", 0, [[0, 111, 112, 113], [121, 122, 123, 0]]),
        (None, 1, [[0, 11, 112, 113], [21, 122, 123, 0]]),
        ("last", 0, [[0, 11, 12, 113], [21, 22, 123, 0]]),
        (0, 0, [[0, 111, 12, 13], [121, 22, 23, 0]]),
        ("1:", 0, [[0, 11, 112, 113], [21, 122, 123, 0]]),
        (lambda call: call.input_ids == 22, 0, [[0, 11, 12, 13], [21, 122, 23, 0]]),
    ],
)
@pytest.mark.parametrize("way", ["vector", "steer_fn"])
def test_only_the_selected_tokens_are_steered(tokens: Any, skip_first: int, expected: Any, way: str) -> None:
    how = {"vector": torch.tensor([100.0])} if way == "vector" else {"steer_fn": lambda output, **_: output + 100}
    factory = SteeringVectors(["layer"], **how, tokens=tokens, skip_first=skip_first)
    with factory.prepare(Tokens()) as hooked:
        assert hooked(input_ids=IDS, attention_mask=MASK)[..., 0].tolist() == expected
        assert hooked(TensorDict({"input_ids": IDS, "attention_mask": MASK}))["output"][..., 0].tolist() == expected


@pytest.mark.parametrize("returns", [True, False])
def test_a_steer_fn_that_writes_in_place_gets_rows_of_its_own(returns: bool) -> None:
    def write(module_key: str, output: Tensor) -> Tensor | None:
        output.add_(100)
        return output if returns else None

    ids = IDS[:, 1:3]
    for tokens in ("all", "last"):
        with SteeringVectors(["layer"], write, tokens=tokens).prepare(Tokens()) as hooked:
            out = hooked(input_ids=ids)[..., 0]
        places = torch.ones(2, 2) if tokens == "all" else torch.tensor([[0, 1], [0, 1]])
        assert torch.equal(out, ids + 100.0 * places * returns)


def test_padding_without_a_mask_is_refused_for_tokens() -> None:
    model = Tokens()
    model.config = type("Config", (), {"pad_token_id": 0})()
    with SteeringVectors(["layer"], vector=V[:1], tokens="last", required=False).prepare(model) as hooked:
        with pytest.raises(ValueError, match="no attention mask"):
            hooked(input_ids=IDS)


def test_a_clause_that_selects_nothing_is_an_error() -> None:
    with SteeringVectors(["layer"], vector=V[:1], tokens=8, required=False).prepare(Tokens()) as hooked:
        with pytest.raises(ValueError, match="matches no token"):
            hooked(input_ids=IDS, attention_mask=MASK)
    with pytest.raises(RuntimeError, match="tokens='generated' selected nothing"):
        with SteeringVectors(["layer"], vector=V[:1], tokens="generated").prepare(Tokens()) as hooked:
            hooked(input_ids=IDS, attention_mask=MASK)


def test_a_module_called_on_its_own_has_no_tokens() -> None:
    model = Tokens()
    with SteeringVectors(["layer"], negate, tokens="last", required=False).prepare(model):
        with pytest.raises(RuntimeError, match="a module of it was called on its own"):
            model.layer(X)


# Order, faults, threads, gradients.


def test_a_cache_sees_the_steered_value_whichever_was_entered_first() -> None:
    for order in (1, -1):
        model = chain()
        contexts = [SteeringVectors(["[0]"], negate).prepare(model), ActivationCaching("0").prepare(model)]
        with contexts[::order][0], contexts[::order][1]:
            model(X)
        assert torch.equal(contexts[1].cache["0"], -2 * X)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "steer_fn"])
def test_an_error_leaves_the_model_as_it_was(where: str, error: Any, hooks_of: Any) -> None:
    model, armed = chain(), [where]

    def fail(place: str) -> None:
        if place in armed:
            raise error(place)

    user = model[1].register_forward_pre_hook(lambda *_: fail("model"))
    context = SteeringVectors(["[0]"], lambda **_: fail("steer_fn")).prepare(model)
    with pytest.raises(error, match=where) as caught, context as hooked:
        hooked(X)
    assert caught.value.__context__ is None and hooks_of(model) == 1
    armed.clear()
    with context as hooked:
        assert torch.equal(hooked(X), -(2 * X + 1))
    user.remove()


def test_a_generator_closed_early_leaves_no_hook(hooks_of: Any) -> None:
    model = chain()

    def outputs() -> Any:
        with SteeringVectors(["[0]"], negate).prepare(model) as hooked:
            while True:
                yield hooked(X)

    stream = outputs()
    assert torch.equal(next(stream), -(-2 * X + 1))
    stream.close()
    assert hooks_of(model) == 0 and torch.equal(model(X), -(2 * X + 1))


def test_two_threads_on_one_model_steer_on_their_own() -> None:
    model, found, barrier = chain(), {}, threading.Barrier(2)

    def work(scale: float) -> None:
        with SteeringVectors(["[0]"], vector=V, scale=scale).prepare(model):
            barrier.wait(5)
            found[scale] = {tuple(model(X).flatten().tolist()) for _ in range(20)}
            barrier.wait(5)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 7.0)]
    for thread in threads:
        thread.start()
    with SteeringVectors(["[0]"], vector=V, scale=3.0).prepare(model):
        for thread in threads:
            thread.join(20)
        assert torch.equal(model(X), -(2 * X + 3 * V + 1))
    assert found == {scale: {tuple((-(2 * X + scale * V + 1)).flatten().tolist())} for scale in (1.0, 7.0)}


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant, self.runs = nn.Identity(), reentrant, 0

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return checkpoint(self._inner, inputs_embeds, use_reentrant=self.reentrant)

    def _inner(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.layer(x) ** 2


@pytest.mark.parametrize("tokens", [None, "last"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_steering_acts_when_gradient_checkpointing_computes_again(reentrant: bool, tokens: Any) -> None:
    model = Checkpointed(reentrant)
    with SteeringVectors(["layer"], vector=V, tokens=tokens).prepare(model) as hooked:
        for mask in (torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 0, 0], [1, 1, 1]])):
            x = torch.randn(2, 3, 2, requires_grad=True)
            hooked(inputs_embeds=x, attention_mask=mask).sum().backward()
            added = V.expand(2, 3, 2).clone()
            if tokens:
                added[torch.arange(3) != mask.sum(1, keepdim=True) - 1] = 0
            torch.testing.assert_close(x.grad, 2 * (x + added).detach())
    assert model.runs == 4 and hooked.hooking_context.n_fired == {"layer": 2}


def test_a_repeated_pass_that_cannot_be_told_from_another_is_refused() -> None:
    with SteeringVectors(["layer"], vector=V, tokens="last").prepare(Checkpointed(False)) as hooked:
        losses = []
        for mask in (torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 0, 0], [1, 1, 1]])):
            x = torch.randn(2, 3, 2, requires_grad=True)
            losses.append(hooked(inputs_embeds=x, attention_mask=mask).sum())
        with pytest.raises(RuntimeError, match="repeats one of 2 forward passes, whose selected tokens differ"):
            sum(losses).backward()


def test_autocast_and_inference_mode() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert steered(SteeringVectors(["[0]"], vector=V)).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(steered(SteeringVectors(["[0]"], vector=V)), -(2 * X + V + 1))


@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_compiled_model_is_steered(when: str) -> None:
    model = chain()
    compiled = torch.compile(model, backend="eager")
    if when == "before":
        assert torch.equal(compiled(X), -(2 * X + 1))
    with SteeringVectors(["[0]"], vector=V).prepare(compiled) as hooked:
        assert torch.equal(hooked(X), -(2 * X + V + 1)) and torch.equal(compiled(X), -(2 * X + V + 1))
    assert torch.equal(compiled(X), -(2 * X + 1))


def test_a_compiled_layer_is_steered_and_so_is_a_module_in_it() -> None:
    model = nn.Sequential(torch.compile(nn.Sequential(chain()[0], nn.Identity()), backend="eager"), *chain()[1:])
    assert torch.equal(model(X), -(2 * X + 1))
    for path in ("[0]", "[0][0]"):
        assert torch.equal(steered(SteeringVectors([path], vector=V), X, model), -(2 * X + V + 1))
    assert torch.equal(model(X), -(2 * X + 1))


def test_a_wrapper_in_the_style_of_data_parallel() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Tensor:
            return self.module(*args)

    assert torch.equal(steered(SteeringVectors(["module[0]"], vector=V), X, Wrapper(chain())), -(2 * X + V + 1))


def test_a_copied_or_saved_model_is_not_steered(tmp_path: Path) -> None:
    model = chain()
    with SteeringVectors(["[0]"], vector=V).prepare(model) as hooked:
        hooked(X)
        assert torch.equal(copy.deepcopy(model)(X), -(2 * X + 1))
        torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(X), -(2 * X + 1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda factory: pickle.loads(pickle.dumps(factory))])  # noqa: S301
def test_a_factory_is_a_value(copied: Any) -> None:
    for factory in (SteeringVectors(["[0]"], negate), SteeringVectors(["[0]"], vector=V, tokens=None, scale=2)):
        expected = steered(factory)
        assert torch.equal(steered(copied(factory)), expected)


# Directions as values.


def test_a_direction_is_saved_with_what_applying_it_again_takes(tmp_path: Path) -> None:
    direction = SteeringDirection(V, read="[1]", write="[0]", sign=-1, scale=2.0, tokens="mean", method="pca")
    direction.save(tmp_path / "v1.2")
    assert {path.name for path in tmp_path.iterdir()} == {"v1.2.safetensors", "v1.2.json"}
    again = SteeringDirection.load(tmp_path / "v1.2")
    assert torch.equal(again.vector, V)
    assert (again.read, again.write, again.sign, again.scale) == ("[1]", "[0]", -1, 2.0)
    assert (again.tokens, again.method) == ("mean", "pca")
    assert torch.equal(steered(again.steering()), -(2 * X - 2 * V + 1))
    assert torch.equal(steered(again.steering(scale=0.5)), -(2 * X - V / 2 + 1))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "another"}', '{"format": "tdprobe steering direction 1", "x": 1}']
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str) -> None:
    SteeringDirection(V, read="[0]", write="[0]").save(tmp_path / "v")
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(ValueError, match=r"v\.json"):
        SteeringDirection.load(tmp_path / "v")
    with pytest.raises(ValueError, match="cannot read a steering direction from 'none"):
        SteeringDirection.load(tmp_path / "none")


@pytest.mark.parametrize(
    "given", [{"sign": 0}, {"sign": 2}, {"vector": [1.0]}, {"vector": torch.ones(2, dtype=torch.long)}]
)
def test_what_is_no_direction_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="direction"):
        SteeringDirection(**{"vector": V, "read": "[0]", "write": "[0]"} | given)
