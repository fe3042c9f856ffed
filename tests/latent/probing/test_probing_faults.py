from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from probing_tools import KEYS, Recorder, X, Y, accuracy, batch, linear_manager, net
from tdprobe.latent import (
    ActivationCaching,
    BilinearEstimator,
    BilinearProbeManager,
    LinearEstimator,
    ProbeManager,
    Probing,
)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_probes_are_fitted_in_any_mode_of_the_model(mode: Any) -> None:
    model, manager = net(), linear_manager()
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    labels = (model.first(rows)[:, 0] > model.first(rows)[:, 1]).long()
    torch.manual_seed(0)
    with mode(), Probing("first", manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
        hooked(rows, labels=labels, step_type="fit")
        hooked(rows, labels=labels, step_type="predict")
    assert manager.fit_metrics["first_fwd"]["accuracy"] > 0.95
    assert manager.predict_metrics == manager.fit_metrics
    assert all(p.grad is None for p in model.parameters())


def test_probes_change_neither_output_nor_gradient_nor_random_state() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    manager = linear_manager(allow_overwrite=True)
    torch.manual_seed(0)
    expected = model(X)
    expected.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with Probing("[01]", manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
        torch.manual_seed(0)
        td = hooked(batch())
        td["output"].sum().backward()
    assert torch.equal(td["output"], expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_a_probe_leaves_no_hook_and_the_finished_results(error: type[BaseException], hooks_of: Any) -> None:
    model, manager = net(), linear_manager()

    class Failing:
        def step(self, data: Any, **items: Any) -> None:
            raise error

    def factory(name: str, direction: str) -> Any:
        return Failing() if name == "blocks.1" else manager.probe_factory(name, direction)

    before = model(X)
    with (
        pytest.raises(error),
        Probing("first|blocks.1", factory, additional_keys=KEYS).prepare(model) as hooked,
    ):
        hooked(batch())
    assert hooks_of(model) == 0 and set(manager.fit_metrics) == {"first_fwd"}
    assert torch.equal(model(X), before)


def test_an_error_of_an_estimator_names_the_module_and_what_it_was_given() -> None:
    with (
        pytest.raises(ValueError, match="inconsistent numbers of samples") as caught,
        Probing("first", ProbeManager(LogisticRegression, {}, accuracy).probe_factory, additional_keys=KEYS).prepare(
            net()
        ) as hooked,
    ):
        hooked(X, labels=torch.arange(len(X) - 1) % 2, step_type="fit")
    (note,) = caught.value.__notes__
    assert note.startswith("in the probe of 'first' (fwd), step_type='fit', rows of shape (")
    assert note.endswith(f"labels of ({len(X) - 1},)")


def test_enter_is_all_or_none_and_can_be_repeated(hooks_of: Any) -> None:
    model, manager = net(), linear_manager()
    broken = True

    def factory(name: str, direction: str) -> Any:
        if broken and name == "blocks.0":
            raise ZeroDivisionError
        return manager.probe_factory(name, direction)

    context = Probing("first|blocks.0", factory, additional_keys=KEYS).prepare(model)
    with pytest.raises(ZeroDivisionError), context:
        pass
    assert hooks_of(model) == 0 and manager.estimators == {} and not context.in_context
    broken = False
    with context as hooked:
        hooked(batch())
    assert set(manager.fit_metrics) == {"first_fwd", "blocks.0_fwd"}


def test_a_second_block_needs_a_reset_or_goes_on_with_the_fitted_estimators() -> None:
    model, strict, lasting = net(), linear_manager(), linear_manager(allow_overwrite=True)
    for manager in (strict, lasting):
        with Probing("first", manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
            hooked(batch())
    fitted = {name: p.clone() for name, p in lasting.estimators["first_fwd"].named_parameters()}
    with pytest.raises(ValueError, match="'first_fwd' already"):
        with Probing("first", strict.probe_factory, additional_keys=KEYS).prepare(model):
            pass
    with Probing("first", lasting.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
        hooked(batch(step_type="predict"))
    assert all(torch.equal(p, fitted[name]) for name, p in lasting.estimators["first_fwd"].named_parameters())
    assert lasting.predict_metrics == lasting.fit_metrics
    strict.reset_estimators()
    strict.reset_metrics()
    with Probing("first", strict.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
        hooked(batch())


def test_refused_metrics_leave_no_hook(hooks_of: Any) -> None:
    model, manager = net(), linear_manager()
    with pytest.raises(ValueError, match="reset_metrics"):
        with Probing("first", manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
            hooked(batch())
            hooked(batch())
    assert hooks_of(model) == 0


def test_an_error_in_a_pair_keeps_the_pairs_that_are_finished(hooks_of: Any) -> None:
    model = net()
    sizes = {"d_latent1": 4, "d_latent2": 4, "num_classes": 2, "epochs": 5}
    manager = BilinearProbeManager([("first", "blocks.0"), ("first", "blocks.1")], BilinearEstimator, sizes, accuracy)
    with pytest.raises(RuntimeError, match="size|shape|match"):
        with Probing(manager.key_pattern, manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
            manager.before_all()
            hooked(batch())
    # blocks.1 has width 2, so its pair fails after the other one is done.
    assert set(manager.fit_metrics) == {"first_blocks.0_fwd"} and hooks_of(model) == 0


def test_what_a_pair_waits_with_is_immune_to_in_place_writes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    seen = []

    class Keep(BilinearEstimator):
        def fit(self, *data: Tensor, y: Tensor) -> Any:
            seen.extend(data)

    manager = BilinearProbeManager([("0", "2")], Keep, {"d_latent1": 4, "d_latent2": 4, "num_classes": 2}, accuracy)
    with Probing(manager.key_pattern, manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
        hooked(batch())
        manager.after_all()
    assert torch.equal(seen[0], model[0](X)) and bool((seen[0] < 0).any())


def test_a_pair_whose_partner_never_runs_is_reported() -> None:
    manager = BilinearProbeManager([("first", "elsewhere")], LinearEstimator, {"d_latent": 4}, accuracy)
    with Probing(manager.key_pattern, manager.probe_factory, additional_keys=KEYS).prepare(net()) as hooked:
        manager.before_all()
        hooked(batch())
        with pytest.raises(ValueError, match="elsewhere"):
            manager.after_all()


def test_early_stop_ends_the_call_after_the_last_probe() -> None:
    model, manager, ran = net(), linear_manager(), []
    model.blocks.register_forward_hook(lambda *_: ran.append(True))
    with Probing("first", manager.probe_factory, additional_keys=KEYS, early_stop=True).prepare(model) as hooked:
        td = hooked(batch())
        assert hooked(X, labels=Y, step_type="predict") is None
        with pytest.raises(RuntimeError, match="no labels"):
            model.first(X)
    assert not ran and "output" not in td.keys()
    assert set(manager.fit_metrics) == set(manager.predict_metrics) == {"first_fwd"}


def test_a_call_in_another_thread_is_not_probed() -> None:
    model, recorder, outputs = net(), Recorder(), []
    with Probing("first", recorder, additional_keys=KEYS).prepare(model) as hooked:
        thread = threading.Thread(target=lambda: outputs.append(model(X)))
        thread.start()
        thread.join()
        hooked(batch())
    assert len(recorder.steps) == 1 and len(outputs) == 1


def test_two_threads_with_a_context_each() -> None:
    model, managers = net(), [linear_manager(), linear_manager()]
    together = threading.Barrier(2)

    def work(manager: ProbeManager, labels: Tensor) -> None:
        with Probing("first", manager.probe_factory, additional_keys=KEYS).prepare(model) as hooked:
            together.wait()
            hooked(X, labels=labels, step_type="fit")
            together.wait()

    threads = [threading.Thread(target=work, args=(m, torch.full((2,), i))) for i, m in enumerate(managers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, manager in enumerate(managers):
        assert manager.estimators["first_fwd"].predict(model.first(X)).tolist() == [i, i]


def test_factories_can_be_copied_pickled_and_used_for_many_models() -> None:
    factory = Probing("first", linear_manager(allow_overwrite=True).probe_factory, additional_keys=KEYS)
    for twin in (factory, copy.deepcopy(factory)):
        with twin.prepare(net()) as hooked:
            hooked(batch())
    other = ProbeManager(LinearEstimator, {"d_latent": 4, "num_classes": 2, "epochs": 2}, accuracy)
    loaded = pickle.loads(pickle.dumps(Probing("first", other.probe_factory, additional_keys=KEYS)))  # noqa: S301
    with loaded.prepare(net()) as hooked:
        hooked(batch())


def test_a_context_without_a_block_can_be_restored(hooks_of: Any) -> None:
    model, recorder = net(), Recorder()
    hooked = Probing("first", recorder, additional_keys=KEYS).prepare(model, return_context=False)
    hooked(batch())
    hooked.restore()
    assert hooks_of(model) == 0 and len(recorder.steps) == 1
    with pytest.raises(RuntimeError, match="outside"):
        hooked(batch())


def test_it_stacks_with_caching() -> None:
    model, recorder = net(), Recorder()
    probing = Probing("blocks.1", recorder, additional_keys=KEYS)
    with ActivationCaching("blocks.1").prepare(model) as cached, probing.prepare(model) as probed:
        probed(batch())
        cache = cached.hooking_context.cache
        assert torch.equal(cache["blocks.1"], recorder.steps[0][2])


def test_a_compiled_model_is_probed_and_its_probes_are_not_compiled() -> None:
    model, plain = net(), linear_manager()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    traced: list[bool] = []

    def watch(data: Any) -> Any:
        traced.append(torch.compiler.is_compiling())
        return data[0].detach() if isinstance(data, tuple) else data.detach()

    manager = linear_manager(data_preprocess_callback=watch)
    for found, target in ((plain, model), (manager, compiled)):
        torch.manual_seed(0)
        with Probing("first", found.probe_factory, additional_keys=KEYS).prepare(target) as hooked:
            out = hooked(batch())["output"]
    assert traced == [False] and manager.fit_metrics == plain.fit_metrics
    for a, b in zip(*(m.estimators["first_fwd"].parameters() for m in (plain, manager)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(compiled(X), out)
    assert len(traced) == 1
