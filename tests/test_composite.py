"""Several factories as one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdprobe.contexts import CompositeHookingContextFactory, HookingContextFactory
from tdprobe.latent import ActivationCaching, ActivationPatching, LayerScoring, SteeringVectors
from tdprobe.modules import HookedModule

X = torch.tensor([[1.0, 2.0]])


def chain() -> nn.Sequential:
    """Three layers that double, add one and negate."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for layer, scale, shift in zip(model, (2, 1, -1), (0, 1, 0), strict=True):
        layer.weight.data, layer.bias.data = scale * torch.eye(2), torch.full((2,), float(shift))
    return model


def add(amount: float, path: str = "[0]") -> SteeringVectors:
    return SteeringVectors([path], vector=torch.full((2,), amount))


def double(module_key: str, output: Tensor) -> Tensor:
    return output * 2


Composite = CompositeHookingContextFactory


@pytest.mark.parametrize("order", [0, 1])
def test_a_cache_in_a_composite_sees_the_steered_value_in_any_order(order: int, hooks_of: Any) -> None:
    model = chain()
    parts = [ActivationCaching("[01]"), add(10)][:: -1 if order else 1]
    with Composite(*parts).prepare(model) as hooked:
        assert isinstance(hooked, HookedModule)
        assert torch.equal(hooked(X), -(2 * X + 11))
        assert hooked.relative_path == "td_module.module"
    context = hooked.hooking_context
    assert torch.equal(context.cache["0"], 2 * X + 10) and torch.equal(context.cache["1"], 2 * X + 11)
    assert context.n_fired == {"0": 1, "1": 1, "[0]": 1} and hooks_of(model) == 0


def test_interventions_act_in_the_order_of_the_factories() -> None:
    times = SteeringVectors(["[0]"], double)
    for parts, expected in (((times, add(3)), 4 * X + 3), ((add(3), times), 4 * X + 6)):
        with Composite(*parts).prepare(chain()) as hooked:
            assert torch.equal(hooked(X), -(expected + 1))


def test_scores_and_a_cache_come_from_one_pass() -> None:
    rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    with Composite(LayerScoring("[02]"), ActivationCaching("1")).prepare(chain()) as hooked:
        hooked(rows)
    context = hooked.hooking_context
    # A layer that only negates is the same up to an orthogonal map.
    assert context.scores().matrix() == pytest.approx(torch.ones(2, 2).numpy(), abs=1e-5)
    assert torch.equal(context.cache["1"], rows * 2 + 1)


def test_patching_in_a_composite_keeps_its_way_of_calling() -> None:
    td = TensorDict({"input": X, "patched": {"input": X * 100}}, batch_size=[1])
    for order in (1, -1):
        with Composite(*[ActivationPatching(["[0]"]), ActivationCaching("2")][::order]).prepare(chain()) as hooked:
            result = hooked(td)
            assert torch.equal(result["patched", "output"], -(2 * X + 1))
            assert torch.equal(hooked.patch(X, X * 100), -(2 * X + 1))
        assert torch.equal(hooked.hooking_context.cache["2"], -(2 * X + 1))


def test_relative_false_names_are_those_of_a_single_context() -> None:
    with Composite(add(1), ActivationCaching("", relative=False)).prepare(chain()) as hooked:
        hooked(X)
    names = {"td_module.module", *(f"td_module.module.{i}" for i in range(3))}
    assert set(hooked.hooking_context.cache.keys()) == names


def test_two_caches_are_told_apart() -> None:
    with Composite(ActivationCaching("0"), ActivationCaching("2")).prepare(chain()) as hooked:
        hooked(X)
    context = hooked.hooking_context
    assert [list(part.cache.keys()) for part in context.contexts] == [["0"], ["2"]]
    with pytest.raises(AttributeError, match=r"contexts\[0\]\.cache, contexts\[1\]\.cache"):
        _ = context.cache
    with pytest.raises(AttributeError, match="no part has 'cahce'"):
        _ = context.cahce
    context.clear()
    assert all(part.cache.is_empty() for part in context.contexts)


def test_contents_survive_the_block_and_a_new_one() -> None:
    context = Composite(ActivationCaching("0", clear_cache=False), add(1)).prepare(chain())
    cache = context.cache
    for scale in (1, 2):
        with context as hooked:
            hooked(X * scale)
            with pytest.raises(RuntimeError, match="twice"), context:
                pass
        assert context.cache is cache and torch.equal(cache["0"], 2 * scale * X + 1)


def test_all_hooks_are_lifted_together(hooks_of: Any) -> None:
    model = chain()
    with Composite(ActivationCaching("0"), add(1)).prepare(model) as hooked:
        hooked(X)
        with hooked.disable_context_hooks():
            assert hooks_of(model) == 0
        with hooked.hooking_context.disable() as given:
            assert given is model and hooks_of(model) == 0
        assert hooks_of(model) == 2 and torch.equal(hooked(X), -(2 * X + 2))
    with pytest.raises(RuntimeError, match="outside"), hooked.disable_context_hooks():
        pass


def test_return_context_false_and_restore(hooks_of: Any) -> None:
    model = chain()
    hooked = Composite(ActivationCaching("0"), add(1)).prepare(model, return_context=False)
    assert torch.equal(hooked(X), -(2 * X + 2)) and hooks_of(model) == 2
    hooked.restore()
    assert hooks_of(model) == 0 and "0" in hooked.hooking_context.cache.keys()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_in_the_block_comes_through_alone(error: Any, hooks_of: Any) -> None:
    model = chain()
    with pytest.raises(error) as caught, Composite(ActivationCaching("0"), add(1)).prepare(model):
        raise error("the cause")
    assert caught.value.__context__ is None and hooks_of(model) == 0


def test_a_part_that_cannot_enter_takes_the_others_back(hooks_of: Any) -> None:
    model = chain()
    context = Composite(ActivationCaching("0"), add(1, "[9]")).prepare(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\[9\]"), context:
            pass
        assert hooks_of(model) == 0 and not any(part.in_context for part in context.contexts)


def test_a_part_that_never_fires_is_an_error() -> None:
    model = chain()
    model.forward = lambda x: model[0](x)
    with pytest.raises(RuntimeError, match=r"nothing was done at '\[2\]'"):
        with Composite(ActivationCaching("0"), add(1, "[2]")).prepare(model) as hooked:
            hooked(X)


def test_composites_nest() -> None:
    inner = Composite(add(1), SteeringVectors(["[0]"], double))
    with Composite(inner, ActivationCaching("0")).prepare(chain()) as hooked:
        assert torch.equal(hooked(X), -(4 * X + 2 + 1))
    assert torch.equal(hooked.hooking_context.cache["0"], 4 * X + 2)


class Wrapping(HookingContextFactory):
    """Counts preparing and restoring, and scales what the module returns."""

    def __init__(self, log: list[str], name: str, factor: float) -> None:
        super().__init__()
        self.log, self.name, self.factor = log, name, factor

    def _prepare_module(self, module: Any, in_keys: Any, out_keys: Any, extra_relative_path: str) -> Any:
        self.log.append(f"prepare {self.name}")
        return Scaled(module, self.factor)

    def _restore_module(self, module: Any, in_keys: Any, out_keys: Any, extra_relative_path: str) -> Any:
        self.log.append(f"restore {self.name}")
        return module


class Scaled(TensorDictModuleBase):
    def __init__(self, inner: TensorDictModuleBase, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor
        self.in_keys, self.out_keys = inner.in_keys, inner.out_keys

    def forward(self, td: Any) -> Any:
        td = self.inner(td)
        return td.set("output", td["output"] * self.factor)


def test_prepared_modules_are_chained_and_restored_in_reverse() -> None:
    log: list[str] = []
    with Composite(Wrapping(log, "a", 3), Wrapping(log, "b", 5)).prepare(chain()) as hooked:
        assert torch.equal(hooked(TensorDict({"input": X}))["output"], -15 * (2 * X + 1))
    assert log == ["prepare a", "prepare b", "restore b", "restore a"]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ((), "at least one factory"),
        (([ActivationCaching("0")],), "got a list; pass them one by one"),
        ((ActivationCaching("0", early_stop=True), add(1)), "early_stop of ActivationCaching"),
    ],
)
def test_what_cannot_be_composed_is_refused(parts: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Composite(*parts)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda factory: pickle.loads(pickle.dumps(factory))])  # noqa: S301
def test_a_composite_is_a_value(copied: Any) -> None:
    factory = copied(Composite(ActivationCaching("0"), SteeringVectors(["[0]"], double), add(3)))
    with factory.prepare(chain()) as hooked:
        assert torch.equal(hooked(X), -(4 * X + 3 + 1))
    assert torch.equal(hooked.hooking_context.cache["0"], 4 * X + 3)
