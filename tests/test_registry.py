"""The registry finds estimators by name, its own and those of other packages."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from tdprobe import registry
from tdprobe.errors import ConfigError
from tdprobe.latent.representation_similarity import CkaEstimator

SPEC = registry.Spec(
    name="plugin",
    kind="layer",
    symmetric=False,
    bounds=(0.0, 2.0),
    larger_means="larger",
    invariant_to=frozenset({"translation"}),
    needs=("moments",),
    cost="n",
    reference="none",
    streaming={"size": 7},
)


class Plugin:
    def __init__(self, size=1):
        self.size = size


def declare(monkeypatch, loader):
    """Pretend that another package declares an entry point."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    entry = EntryPoint("plugin", "some_package.estimators", registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: loader())
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.GROUP else [])
    registry._load.cache_clear()


def test_names_hold_what_get_returns():
    assert registry.get("cka") is CkaEstimator
    assert "cka" in registry.names() and list(registry.names()) == sorted(registry.names())
    assert all(registry.get(name).spec.name == name for name in registry.names())


def test_a_name_is_found_before_anything_of_the_library_was_imported():
    code = "from tdprobe import registry; print(registry.get('cka').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "CkaEstimator"


def test_an_unknown_name_is_answered_with_close_ones():
    with pytest.raises(ConfigError, match="unknown estimator 'ckaa'; did you mean 'cka'"):
        registry.get("ckaa")


def test_entry_points_of_other_packages_are_found(monkeypatch):
    declare(monkeypatch, lambda: registry.register(SPEC)(Plugin))
    assert registry.get("plugin") is Plugin
    assert {"cka", "plugin"} <= set(registry.names())


def test_a_broken_entry_point_is_named_and_the_others_stay(monkeypatch):
    def broken():
        raise RuntimeError("no such device")

    declare(monkeypatch, broken)
    with pytest.warns(UserWarning, match=r"some_package\.estimators.*no such device"):
        assert "cka" in registry.names()


def test_streaming_builds_names_and_classes_and_leaves_instances_alone(monkeypatch):
    robust = registry.streaming("cka")
    assert (robust.mode, robust.unbiased, robust.minibatch) == ("robust", None, True)
    assert registry.streaming(CkaEstimator, "strict").mode == "strict"
    own = CkaEstimator()
    assert registry.streaming(own) is own
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    assert registry.streaming(registry.register(SPEC)(Plugin)).size == 7


def test_a_taken_name_is_refused_but_a_module_may_be_loaded_again(monkeypatch):
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    registry.register(SPEC)(Plugin)
    again = type("Plugin", (), {"__module__": Plugin.__module__, "__qualname__": Plugin.__qualname__})
    assert registry.register(SPEC)(again) is registry.get("plugin")
    with pytest.raises(ConfigError, match=r"'plugin' of .*Other is taken by .*Plugin"):
        registry.register(SPEC)(type("Other", (), {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pairs"}, "'plugin': unknown kind 'pairs'; did you mean 'pair'"),
        (
            {"invariant_to": frozenset({"orthogonall"})},
            "unknown invariance 'orthogonall'; did you mean 'orthogonal'",
        ),
        ({"bounds": (1.0, 0.0)}, r"bounds \(1.0, 0.0\)"),
    ],
)
def test_a_wrong_spec_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SPEC, **change)


def test_specs_are_values():
    assert dataclasses.replace(SPEC) == SPEC and hash(dataclasses.replace(SPEC)) == hash(SPEC)
    assert dataclasses.replace(SPEC, cost="n^2") != SPEC


MEASURES = """
cka procrustes cca svcca pwcca linear_regression gulp rsa distance_correlation information_imbalance mutual_knn jaccard
cknna second_order_cosine rank_similarity twonn mle local_knn gride corr_int local_pca
participation_ratio effective_rank
"""


@pytest.mark.parametrize("name", MEASURES.split())
def test_every_measure_of_similarity_and_dimension_has_modes(name):
    cls = registry.get(name)
    assert (cls().mode, registry.streaming(name).mode, registry.streaming(name, "strict").mode) == (
        "strict",
        "robust",
        "strict",
    )
    assert "mode='robust'" in repr(cls(mode="robust"))
    with pytest.raises(ConfigError, match="unknown mode 'robst'; did you mean 'robust'"):
        cls(mode="robst")
