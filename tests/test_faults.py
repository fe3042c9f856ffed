"""Every factory under every fault: the hooks go, the model is what it was, and finished batches stay."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdprobe.contexts import CompositeHookingContextFactory, HookingContextFactory
from tdprobe.latent import (
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    AttentionPatterns,
    LayerScoring,
    MaxActivating,
    NoisedInformation,
    Probing,
    SteeringVectors,
)

LAYER = "model.layers[1]"
PATTERN = r"(module\.|_orig_mod\.)?model\.layers\.1$"


def inputs(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 128, (3, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CLEAN, OTHER = inputs(0), inputs(1)


class Sums:
    """A probe that counts what it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def step(self, data: Any, **_: Any) -> None:
        self.seen.append(data.detach().sum())


PROBE = Sums()


def probe(name: str, direction: str) -> Sums:
    return PROBE


def double(module_key: str, output: Tensor) -> Tensor:
    return 2 * output


@dataclass(frozen=True)
class Case:
    """A factory, one unit of work with it, and what that work leaves in the context."""

    make: Callable[[str], HookingContextFactory]
    run: Callable[[Any], Any]
    left: Callable[[Any], int]


def fired(context: Any) -> int:
    return sum(context.n_fired.values())


def noised(hooked: Any) -> Any:
    if hooked.hooking_context._levels is None:
        with hooked.calibrating():
            hooked(**CLEAN)
    return hooked(**CLEAN)


def composite(lead: str) -> HookingContextFactory:
    return CompositeHookingContextFactory(
        ActivationCaching(PATTERN), SteeringVectors([lead + LAYER], double), LayerScoring(PATTERN)
    )


CASES = {
    "caching": Case(lambda lead: ActivationCaching(PATTERN), lambda h: h(**CLEAN), lambda c: len(c.cache.keys())),
    "scoring": Case(lambda lead: LayerScoring(PATTERN), lambda h: h(**CLEAN), lambda c: c.n_rows),
    "patching": Case(lambda lead: ActivationPatching([lead + LAYER]), lambda h: h.patch(CLEAN, OTHER), fired),
    "steering": Case(lambda lead: SteeringVectors([lead + LAYER], double), lambda h: h(**CLEAN), fired),
    "addition": Case(lambda lead: ActivationAddition([lead + LAYER]), lambda h: h.contrast(CLEAN, OTHER), fired),
    "probing": Case(
        lambda lead: Probing(PATTERN, probe, additional_keys=["labels", "step_type"]),
        lambda h: h(CLEAN, labels=torch.ones(3), step_type="fit"),
        lambda c: len(PROBE.seen),
    ),
    "attention": Case(
        lambda lead: AttentionPatterns(PATTERN.removesuffix("$") + r"\.self_attn$"),
        lambda h: h(**CLEAN),
        lambda c: len(c.cache.keys()),
    ),
    "largest": Case(
        lambda lead: MaxActivating(PATTERN, k=2),
        lambda h: h(**CLEAN),
        lambda c: 0 if c._state is None else int(c._state.n),
    ),
    "noise": Case(lambda lead: NoisedInformation(PATTERN, noise=0.1), noised, lambda c: c.scorer.n),
    "composite": Case(composite, lambda h: h(**CLEAN), lambda c: c.contexts[2].n_rows),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    PROBE.seen.clear()
    yield CASES[request.param]


@pytest.fixture
def unharmed(new_llama: nn.Module, hooks_of: Callable[[nn.Module], int]) -> Iterator[nn.Module]:
    """Yield a model and check at the end that nothing is left on it."""
    model = new_llama
    with torch.no_grad():
        before = model(**CLEAN).logits
    mode = [module.training for module in model.modules()]
    yield model
    with torch.no_grad():
        assert torch.equal(model(**CLEAN).logits, before)
    assert hooks_of(model) == 0
    assert [module.training for module in model.modules()] == mode
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.0", "model.layers.2", "lm_head"])
def test_an_error_in_the_model(case: Case, unharmed: nn.Module, error: type[BaseException], place: str) -> None:
    def fail(*_: Any) -> None:
        raise error("broken")

    context = case.make("").prepare(unharmed)
    with pytest.raises(error, match="broken"), torch.no_grad(), context as hooked:
        case.run(hooked)
        finished = case.left(context)
        handle = unharmed.get_submodule(place).register_forward_hook(fail)
        try:
            case.run(hooked)
        finally:
            handle.remove()
    assert finished > 0 and case.left(context) >= finished
    with torch.no_grad(), context as hooked:
        case.run(hooked)


def test_an_error_in_the_users_callback(unharmed: nn.Module) -> None:
    def fail(**_: Any) -> Any:
        raise ArithmeticError("mine")

    class Failing:
        def step(self, data: Any, **_: Any) -> None:
            fail()

    keys = ["labels", "step_type"]
    factories = {
        "caching": ActivationCaching(PATTERN, callback=fail),
        "patching": ActivationPatching([LAYER], patch_fn=fail),
        "steering": SteeringVectors([LAYER], fail),
        "addition": ActivationAddition([LAYER], cache_callback=fail),
        "probing": Probing(PATTERN, lambda name, direction: Failing(), additional_keys=keys),
    }
    for name, factory in factories.items():
        with pytest.raises(ArithmeticError, match="mine"), torch.no_grad(), factory.prepare(unharmed) as hooked:
            CASES[name].run(hooked)


def test_a_generator_that_is_closed_early(case: Case, unharmed: nn.Module) -> None:
    context = case.make("").prepare(unharmed)

    def batches() -> Iterator[Any]:
        with torch.no_grad(), context as hooked:
            for _ in range(10):
                yield case.run(hooked)

    stream = batches()
    next(stream), next(stream)
    stream.close()
    assert case.left(context) > 0


def test_factories_copy_and_pickle(case: Case, unharmed: nn.Module) -> None:
    factory = case.make("")
    for twin in (copy.deepcopy(factory), pickle.loads(pickle.dumps(factory))):  # noqa: S301
        context = twin.prepare(unharmed)
        with torch.no_grad(), context as hooked:
            case.run(hooked)
        assert case.left(context) > 0


def test_a_model_that_is_copied_or_saved_in_the_block(case: Case, unharmed: nn.Module) -> None:
    context, file = case.make("").prepare(unharmed), io.BytesIO()
    with torch.no_grad():
        expected = unharmed(**CLEAN).logits
        with context as hooked:
            case.run(hooked)
            left = case.left(context)
            torch.save(unharmed, file)
            file.seek(0)
            twins = [copy.deepcopy(unharmed), torch.load(file, weights_only=False)]
            inside = [twin(**CLEAN).logits for twin in twins]
            assert case.left(context) == left
        outside = [twin(**CLEAN).logits for twin in twins]
    assert all(torch.equal(found, expected) for found in inside + outside)


def test_an_enter_that_fails_half_way(case: Case, unharmed: nn.Module, hooks_of: Callable[[nn.Module], int]) -> None:
    layer = unharmed.model.layers[1]
    for part in (layer, layer.self_attn):
        part.register_forward_hook = lambda *_, **__: 1 / 0
    context = case.make("").prepare(unharmed)
    with pytest.raises(ZeroDivisionError), context:
        pass
    assert hooks_of(unharmed) == 0 and not context.in_context
    for part in (layer, layer.self_attn):
        del part.register_forward_hook
    with torch.no_grad(), context as hooked:
        case.run(hooked)
    assert case.left(context) > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(case: Case, unharmed: nn.Module, reentrant: bool) -> None:
    unharmed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    unharmed.train()
    context = case.make("").prepare(unharmed)
    with context as hooked:
        output = case.run(hooked)
        left = case.left(context)
        if "logits" in (output if output is not None else {}):
            output.logits.sum().backward()
            assert unharmed.model.layers[1].mlp.up_proj.weight.grad.isfinite().all()
        assert case.left(context) == left > 0
    unharmed.gradient_checkpointing_disable()
    unharmed.eval()


def test_what_is_dropped_is_freed_at_once(case: Case, tiny_llama: nn.Module) -> None:
    gc.collect()
    gc.disable()
    try:
        context = case.make("").prepare(tiny_llama)
        with torch.no_grad(), context as hooked:
            hooked.get(TensorDict(), LAYER)
            hooked.stop("lm_head")
            case.run(hooked)
        gone = [weakref.ref(dropped) for dropped in (context, hooked)]
        del context, hooked
        assert [dropped() for dropped in gone] == [None, None]
    finally:
        gc.enable()


def test_autocast(case: Case, unharmed: nn.Module) -> None:
    context = case.make("").prepare(unharmed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), context as hooked:
        case.run(hooked)
    assert case.left(context) > 0


def test_a_wrapper_in_the_style_of_data_parallel(case: Case, unharmed: nn.Module) -> None:
    class Parallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    context = case.make("module.").prepare(Parallel(unharmed))
    with torch.no_grad(), context as hooked:
        case.run(hooked)
    assert case.left(context) > 0


def test_code_compiled_before_and_after(case: Case, unharmed: nn.Module) -> None:
    context = case.make("").prepare(torch.compile(unharmed, backend="eager"))
    with torch.no_grad():
        context._module.module(**CLEAN)
        with context as hooked:
            case.run(hooked)
    assert case.left(context) > 0
    torch._dynamo.reset()


def test_contexts_of_every_kind_stacked_and_left_in_any_order(unharmed: nn.Module) -> None:
    names = ["caching", "steering", "scoring", "probing"]
    contexts = [CASES[name].make("").prepare(unharmed) for name in names]
    with torch.no_grad():
        for context in contexts:
            context.__enter__()
        hooked = contexts[-1]._hooked
        CASES["probing"].run(hooked)
        for context in (contexts[1], contexts[3], contexts[0], contexts[2]):
            context.__exit__(None, None, None)
    assert [CASES[name].left(context) > 0 for name, context in zip(names, contexts, strict=True)] == [True] * 4


def test_two_threads_with_a_context_each(case: Case, unharmed: nn.Module) -> None:
    barrier = threading.Barrier(2, timeout=60)
    counts, errors = {}, []

    def work(name: str, runs: int) -> None:
        try:
            context = ActivationCaching(PATTERN, occurrences="all").prepare(unharmed)
            with torch.no_grad(), context as hooked:
                barrier.wait()
                for _ in range(runs):
                    hooked(**CLEAN)
                barrier.wait()
            counts[name] = sum(context.n_fired.values())
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    mine = case.make("").prepare(unharmed)
    with torch.no_grad(), mine as hooked:
        case.run(hooked)
        left = case.left(mine)
        threads = [threading.Thread(target=work, args=(str(runs), runs)) for runs in (2, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert case.left(mine) == left
    assert not errors and counts == {"2": 2, "5": 5}
