"""Entering, leaving, lifting and stacking contexts, whatever goes wrong in between."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from context_tools import Editing, X, chain, values
from tdprobe.contexts import HookingContext, HookingContextFactory, HookingContextWithCache
from tdprobe.errors import ConfigError, TdprobeError
from tdprobe.hooks import MultiHookHandle
from tdprobe.latent import ActivationCaching
from tdprobe.modules import HookedModule

# Entering and leaving.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("demo", r"takes a torch.nn.Module, got 'demo'; tdprobe.hf.load\(name\).model is one"),
        (SimpleNamespace(model=nn.Linear(2, 2)), "got a SimpleNamespace; prepare its .model$"),
        (nn.Linear, "got a type"),
    ],
)
def test_what_is_no_module_is_refused_by_name(given, said):
    with pytest.raises(ConfigError, match=said):
        ActivationCaching("").prepare(given)


def test_nothing_is_installed_by_prepare_and_nothing_is_left_by_the_block(hooks_of: Any) -> None:
    model = chain()
    context = ActivationCaching("").prepare(model)
    assert isinstance(context, HookingContext) and hooks_of(model) == 0
    with context as hooked:
        assert hooks_of(model) == 3 and isinstance(hooked, HookedModule)
        hooked(X)
    assert hooks_of(model) == 0
    assert values(context) == {"0": 2, "1": 3, "2": -3}


def test_a_context_can_be_entered_again_but_not_twice(hooks_of: Any) -> None:
    model = chain()
    context = ActivationCaching("0").prepare(model)
    for scale in (1, 2):
        with context as hooked:
            hooked(X * scale)
            with pytest.raises(RuntimeError, match="twice") as caught, context:
                pass
            assert isinstance(caught.value, TdprobeError)
            assert hooks_of(model) == 1
        assert values(context) == {"0": 2 * scale}
        assert context.n_fired == {"0": 1}


def test_the_hooked_module_works_inside_its_block_only() -> None:
    with ActivationCaching("0").prepare(chain()) as hooked:
        hooked(X)
    with pytest.raises(RuntimeError, match="outside"):
        hooked(X)


def test_calling_the_original_model_inside_the_block_is_captured_as_well() -> None:
    model = chain()
    with ActivationCaching("1").prepare(model) as hooked:
        model(X)
    assert values(hooked.hooking_context) == {"1": 3}


def test_return_context_false_enters_at_once(hooks_of: Any) -> None:
    model = chain()
    hooked = ActivationCaching("0").prepare(model, return_context=False)
    assert hooks_of(model) == 1
    hooked(X)
    hooked.restore()
    assert hooks_of(model) == 0 and values(hooked.hooking_context) == {"0": 2}
    with pytest.raises(RuntimeError, match="restore"):
        hooked.restore()


def test_restore_refuses_a_managed_context() -> None:
    with ActivationCaching("0").prepare(chain()) as hooked:
        with pytest.raises(RuntimeError, match="with"):
            hooked.restore()
        hooked(X)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["model", "callback", "block"])
def test_an_error_comes_through_and_no_hook_stays(where: str, kind: Any, hooks_of: Any) -> None:
    model, error, armed = chain(), kind("the cause"), [True]

    def fail(place: str) -> None:
        if where == place and armed:
            raise error

    user = model[1].register_forward_pre_hook(lambda *_: fail("model"))
    callback = lambda output, **_: (fail("callback"), output)[1]  # noqa: E731
    context = ActivationCaching("", callback=callback).prepare(model)
    with pytest.raises(kind) as caught, context as hooked:
        hooked(X)
        fail("block")
    assert caught.value is error and error.__context__ is None
    assert hooks_of(model) == 1 and not context.in_context
    armed.clear()
    with context as hooked:
        hooked(X)
    assert values(context) == {"0": 2, "1": 3, "2": -3}
    user.remove()


class Unhookable(nn.Linear):
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no room for a hook")


def test_an_enter_that_fails_half_way_leaves_nothing_and_can_be_repeated(hooks_of: Any) -> None:
    model = chain()
    model.append(Unhookable(2, 2))
    context = ActivationCaching("", directions=["fwd_pre", "fwd"]).prepare(model)
    with pytest.raises(MemoryError, match="no room"), context:
        pass
    assert hooks_of(model) == 0 and not context.in_context
    model.pop(3)
    with context as hooked:
        hooked(X)
    assert context.cache["fwd", "2"][0, 0] == -3 and context.cache["fwd_pre", "2"][0, 0] == 3


def test_a_callback_that_does_not_fit_the_second_direction_leaves_no_hook(hooks_of: Any) -> None:
    model = chain()
    callback = lambda module, args, output, key, direction: output  # noqa: E731
    context = ActivationCaching("", callback=callback, directions=["fwd", "bwd"]).prepare(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="grad_input, grad_output"), context:
            pass
        assert hooks_of(model) == 0


def test_contexts_may_be_left_in_any_order(hooks_of: Any) -> None:
    model = chain()
    first, second, third = (ActivationCaching(name).prepare(model) for name in "012")
    hooked = first.__enter__()
    second.__enter__()
    third.__enter__()
    hooked(X)
    first.__exit__(None, None, None)
    model(X * 2)
    third.__exit__(None, None, None)
    model(X * 3)
    second.__exit__(None, None, None)
    assert [values(c) for c in (first, second, third)] == [{"0": 2}, {"1": 7}, {"2": -5}]
    assert hooks_of(model) == 0


def test_pre_factories_are_entered_first_and_see_the_error(hooks_of: Any) -> None:
    class Composed(ActivationCaching):
        def __init__(self, *before: HookingContextFactory) -> None:
            super().__init__("0")
            self._hooking_context_kwargs |= {"pre_factories": before}

    model = chain()
    factory = Composed(Editing("0", lambda y: y + 10))
    with factory.prepare(model) as hooked:
        hooked(X)
    assert values(hooked.hooking_context) == {"0": 12}
    with pytest.raises(ZeroDivisionError) as caught, factory.prepare(model):
        _ = 1 / 0
    assert caught.value.__context__ is None and hooks_of(model) == 0


class OwnContext(HookingContextWithCache):
    pass


class OwnModule(HookedModule):
    pass


class Logging(HookingContextFactory):
    """A factory as the documentation lets users write one."""

    _hooking_context_class = OwnContext
    _hooked_module_class = OwnModule

    def __init__(self, log: list[Any], **context: Any) -> None:
        super().__init__()
        self.log = log
        self._hooking_context_kwargs |= context

    def _prepare_module(self, module: Any, in_keys: Any, out_keys: Any, extra_relative_path: str) -> Any:
        self.log.append(("prepare", in_keys, out_keys, extra_relative_path))
        return module

    def _restore_module(self, module: Any, in_keys: Any, out_keys: Any, extra_relative_path: str) -> Any:
        self.log.append(("restore", in_keys, out_keys, extra_relative_path))
        return module

    def _spawn_hooked_module(self, prep_module: Any, hooking_context: Any, extra_relative_path: str) -> Any:
        self.log.append("spawn")
        return super()._spawn_hooked_module(prep_module, hooking_context, extra_relative_path)

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        self.log.append("hook")
        return MultiHookHandle([self])

    def remove(self) -> None:
        self.log.append("remove")


def test_a_factory_of_the_users_own_is_entered_and_left_in_the_documented_order() -> None:
    log: list[Any] = []
    cache = TensorDict({"old": X})
    before = Editing("0", lambda y: y + 10)
    before._hook_module = lambda module: log.append(("before", cache.is_empty())) or MultiHookHandle()  # ty: ignore[invalid-assignment]
    factory = Logging(log, cache=cache, pre_factories=[before])
    context = factory.prepare(chain(), ["x"], ["y"])
    assert type(context) is OwnContext and not log
    with context as hooked:
        assert type(hooked) is OwnModule and hooked.hooking_context is context
    keys = (["x"], ["y"], "module")
    entered = [("before", True), ("prepare", *keys), "spawn", "hook"]
    assert log == [*entered, "remove", ("restore", *keys)]


# Lifting hooks.


@pytest.mark.parametrize("way", ["disable_hooks", "disable_context_hooks", "disable", "disable_context"])
def test_hooks_can_be_lifted_for_a_while(way: str, hooks_of: Any) -> None:
    model = chain()
    context = ActivationCaching("0").prepare(model)
    with context as hooked:
        hooked(X)
        with getattr(hooked if "context" in way else context, way)() as given:
            assert hooks_of(model) == 0
            model(X * 5)
            if way == "disable":
                assert given is model
            elif way == "disable_context":
                assert isinstance(given, TensorDictModuleBase)
                assert given(TensorDict({"input": X}))["output"].tolist() == [[-3, -3]]
        assert values(context) == {"0": 2}
        hooked(X * 2)
    assert values(context) == {"0": 4} and hooks_of(model) == 0
    with (
        pytest.raises(RuntimeError, match="outside"),
        getattr(hooked if "context" in way else context, way)(),
    ):
        pass


def test_hooks_lifted_twice_stay_lifted_until_the_outer_end(hooks_of: Any) -> None:
    model = chain()
    context = ActivationCaching("0").prepare(model)
    with context:
        with context.disable_hooks():
            with context.disable_hooks():
                pass
            assert hooks_of(model) == 0
        assert hooks_of(model) == 1


def test_a_block_may_end_while_its_hooks_are_lifted(hooks_of: Any) -> None:
    model = chain()
    context = ActivationCaching("0").prepare(model)
    context.__enter__()
    with context.disable_hooks():
        context.__exit__(None, None, None)
        with context as hooked:
            hooked(X)
            assert hooks_of(model) == 1
    assert hooks_of(model) == 0 and values(context) == {"0": 2}
