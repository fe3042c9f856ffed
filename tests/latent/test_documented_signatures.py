"""Names, parameters and defaults of the documented API; what is new comes after them and can be left out."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from tensordict.nn import TensorDictModuleBase

from tdprobe._types import UnraveledKey
from tdprobe.contexts import HookingContext, HookingContextFactory
from tdprobe.hooks import HookDirection, MultiHookHandle
from tdprobe.modules import HookedModule

# As the documentation writes them.
DOCUMENTED: dict[str, Callable[..., Any]] = {
    "latent.ActivationCaching": lambda key_pattern, relative=True, cache=None, callback=None, directions=None,
    use_nested_keys=False, clear_cache=True: 0,
    "latent.ActivationPatching": lambda modules_to_patch, patch_key="patched", clean_intermediate_keys=True,
    patch_fn=None, cache_callback=None: 0,
    "latent.SteeringVectors": lambda modules_to_steer, steer_fn: 0,
    "latent.ActivationAddition": lambda modules_to_steer, positive_key="positive", negative_key="negative",
    steer_key="steer", clean_intermediate_keys=True, cache_callback=None: 0,
    "latent.Probing": lambda key_pattern, probe_factory, relative=True, directions=None, additional_keys=None,
    classes_to_hook=None, classes_to_skip=None: 0,
    "latent.Probe": lambda estimator, predict_callback, fit_callback=None, data_preprocess_callback=None: 0,
    "latent.ProbeManager": lambda estimator_class, estimator_kwargs, compute_metrics, allow_overwrite=False,
    data_preprocess_callback=None: 0,
    "latent.BilinearProbe": lambda h1_key, h2_key, estimator, predict_callback, fit_callback=None,
    data_preprocess_callback=None: 0,
    "latent.BilinearProbe.step": lambda self, data, key, labels, step_type, **kwargs: 0,
    "latent.Probe.step": lambda self, data, **kwargs: 0,
    "latent.BilinearProbeManager": lambda pairs, estimator_class, estimator_kwargs, compute_metrics,
    allow_overwrite=False, data_preprocess_callback=None: 0,
    "latent.BilinearProbeManager.probe_factory": lambda self, key, direction: 0,
    "latent.ProbeManager.probe_factory": lambda self, key, direction: 0,
    "latent.LinearEstimator": lambda d_latent, bias=True, **kwargs: 0,
    "latent.LowRankBilinearEstimator": lambda d_latent1, d_latent2, bias=True, **kwargs: 0,
    "latent.probing.estimators.BilinearEstimator": lambda d_latent1, d_latent2, bias=True, **kwargs: 0,
    "latent.probing.estimators.TorchEstimator": lambda *, num_classes=None, epochs=100, lr=1e-3, batch_size=128,
    device=None, verbose=False: 0,
    "latent.probing.estimators.TorchEstimator.fit": lambda self, *Xs, y: 0,
    "latent.probing.estimators.TorchEstimator.predict": lambda self, *Xs: 0,
    "latent.MeanDifferenceClassifier": lambda normalize=True: 0,
    "latent.CkaEstimator": lambda in_key_a="data_a", in_key_b="data_b", out_key="cka", kernel="linear", eps=1e-12: 0,
    "latent.InformationImbalanceEstimator": lambda in_key_a="data_a", in_key_b="data_b",
    out_key_a_to_b="information_imbalance_a_to_b", out_key_b_to_a="information_imbalance_b_to_a", p=2.0: 0,
    "latent.TwoNnDimensionEstimator": lambda in_key="data", out_key="dimension", return_xy=False, eps=1e-5: 0,
    "latent.LocalKnnDimensionEstimator": lambda k="auto", in_key="data", out_key="dimension", eps=1e-5: 0,
    "latent.CkaEstimator.forward": lambda self, td: 0,
    "latent.representation_similarity.information_imbalance._validate_inputs": lambda x, y: 0,
    "latent.representation_similarity.information_imbalance._compute_ranks_from_dist": lambda dist: 0,
    "latent.representation_similarity.information_imbalance._as_distance_input_dtype": lambda x, y: 0,
    "latent.representation_similarity.information_imbalance._directional_imbalance": lambda source_ranks,
    target_ranks: 0,
    "latent.representation_similarity.information_imbalance._information_imbalance": lambda x, y, *, p: 0,
    "contexts.HookingContextFactory": lambda: 0,
    "contexts.HookingContextFactory.prepare": lambda self, module, in_keys=None, out_keys=None, *,
    return_context=True: 0,
    "contexts.HookingContextFactory._prepare_module": lambda self, module, in_keys, out_keys, extra_relative_path: 0,
    "contexts.HookingContextFactory._restore_module": lambda self, module, in_keys, out_keys, extra_relative_path: 0,
    "contexts.HookingContextFactory._spawn_hooked_module": lambda self, prep_module, hooking_context,
    extra_relative_path: 0,
    "contexts.HookingContextFactory._hook_module": lambda self, module: 0,
    "modules.HookedModule.get": lambda self, cache, module_key, cache_key=None, callback=None, direction="fwd",
    prepend=False, relative=True: 0,
    "modules.HookedModule.set": lambda self, module_key, value, callback=None, direction="fwd", prepend=False,
    relative=True: 0,
    "modules.HookedModule.stop": lambda self, key: 0,
    "modules.HookedModule.restore": lambda self: 0,
    "modules.HookedModule.disable_context_hooks": lambda self: 0,
    "modules.HookedModule.disable_context": lambda self: 0,
}  # fmt: skip


def find(path: str) -> Any:
    """Import as far as there are modules, and go on by attributes."""
    parts, found = path.split("."), importlib.import_module("tdprobe")
    for part in parts:
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(f"{found.__name__}.{part}")
    return found


@pytest.mark.parametrize("path", DOCUMENTED)
def test_documented_parameters_come_first_with_their_defaults(path: str) -> None:
    documented = list(inspect.signature(DOCUMENTED[path]).parameters.values())
    ours = list(inspect.signature(find(path)).parameters.values())
    positional = [p for p in documented if p.kind is p.POSITIONAL_OR_KEYWORD]
    for given, own in zip(positional, ours, strict=False):
        assert (given.name, given.kind) == (own.name, own.kind)
        # A default where none is documented only allows more.
        assert given.default in (own.default, given.empty)
    assert len(ours) >= len(documented)
    known = {p.name: p for p in ours}
    for parameter in documented[len(positional) :]:
        own = known[parameter.name]
        assert (own.kind, own.default) == (parameter.kind, parameter.default)
    for own in ours:
        added = own.name not in {p.name for p in documented}
        assert not added or own.default is not own.empty or own.kind in (own.VAR_KEYWORD, own.VAR_POSITIONAL)


def test_documented_attributes_and_bases() -> None:
    from tdprobe import latent

    estimators = {
        latent.CkaEstimator(): ["in_key_a", "in_key_b", "out_key", "kernel", "eps"],
        latent.InformationImbalanceEstimator(): ["in_key_a", "in_key_b", "out_key_a_to_b", "out_key_b_to_a", "p"],
        latent.TwoNnDimensionEstimator(): ["in_key", "out_key", "return_xy", "eps"],
        latent.LocalKnnDimensionEstimator(): ["k", "in_key", "out_key", "eps"],
    }
    for estimator, names in estimators.items():
        assert isinstance(estimator, TensorDictModuleBase)
        for name in names:
            assert getattr(estimator, name) == inspect.signature(type(estimator)).parameters[name].default
        keys = [getattr(estimator, name) for name in names if name.startswith(("in_key", "out_key"))]
        assert estimator.in_keys + estimator.out_keys == keys
    for name in ("ActivationCaching", "ActivationPatching", "SteeringVectors", "ActivationAddition", "Probing"):
        factory = getattr(latent, name)
        assert issubclass(factory, HookingContextFactory)
        assert issubclass(factory._hooking_context_class, HookingContext)
        assert issubclass(factory._hooked_module_class, HookedModule)
    assert issubclass(latent.BilinearProbe, latent.Probe)
    assert issubclass(latent.BilinearProbeManager, latent.ProbeManager)
    assert set(HookDirection.__args__) == {"fwd", "fwd_kwargs", "fwd_pre", "fwd_pre_kwargs", "bwd", "bwd_pre"}
    assert len(MultiHookHandle()) == 0 and isinstance("", UnraveledKey)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("activation_caching", ["ActivationCaching"]),
        ("activation_patching", ["ActivationPatching"]),
        ("steering_vectors", ["ActivationAddition", "SteeringVectors"]),
        ("probing.context", ["Probing"]),
        ("probing.estimators", ["LinearEstimator", "LowRankBilinearEstimator", "MeanDifferenceClassifier"]),
        ("probing.managers", ["BilinearProbe", "BilinearProbeManager", "Probe", "ProbeManager"]),
        ("dimension_estimation", ["LocalKnnDimensionEstimator", "TwoNnDimensionEstimator"]),
        ("representation_similarity", ["CkaEstimator", "InformationImbalanceEstimator"]),
    ],
)
def test_documented_names_are_one_object_by_the_short_and_the_long_path(module: str, names: list[str]) -> None:
    for name in names:
        assert find(f"latent.{module}.{name}") is find(f"latent.{name}")


@pytest.mark.parametrize("key", ["a", "", ("a",), ("a", "b")])
def test_what_is_a_key(key: Any) -> None:
    assert isinstance(key, UnraveledKey)


@pytest.mark.parametrize("key", [(), ["a"], 1, None, ("a", ("b",)), ("a", 1)])
def test_what_is_none(key: Any) -> None:
    assert not isinstance(key, UnraveledKey)
