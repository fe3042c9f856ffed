from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

from tdprobe.latent import BilinearProbeManager, LinearEstimator, Probe, ProbeManager

X, Y = torch.eye(3), torch.tensor([0, 1, 1])


class Parrot:
    """An estimator that predicts the labels of its last fit, and counts its fits."""

    def __init__(self, **options: Any) -> None:
        self.options, self.fits, self.labels = options, 0, None

    def fit(self, *data: Any, y: Any) -> None:
        self.fits += 1
        self.labels = y

    def predict(self, *data: Any) -> Any:
        return self.labels


def share(predictions: Any, labels: Any) -> dict[str, Any]:
    return {"accuracy": (predictions == labels).float().mean()}


def manager_of(**options: Any) -> ProbeManager:
    return ProbeManager(Parrot, {"colour": "grey"}, share, **options)


def step(probe: Any, step_type: str, labels: Any = Y) -> None:
    probe.step(X, labels=labels, step_type=step_type)


def test_estimators_and_metrics_lie_under_name_and_direction() -> None:
    manager = manager_of()
    probe = manager.probe_factory("layers.0", "fwd")
    assert isinstance(probe, Probe)
    assert list(manager.estimators) == ["layers.0_fwd"]
    assert manager.estimators["layers.0_fwd"].options == {"colour": "grey"}
    assert manager.fit_metrics == manager.predict_metrics == {}
    step(probe, "fit")
    assert manager.fit_metrics == {"layers.0_fwd": {"accuracy": 1.0}} and manager.predict_metrics == {}
    step(probe, "predict", 1 - Y)
    assert manager.predict_metrics == {"layers.0_fwd": {"accuracy": 0.0}}


def test_results_are_one_tensordict() -> None:
    manager = manager_of()
    assert manager.results.is_empty()
    probe = manager.probe_factory("layers.0", "fwd")
    step(probe, "fit")
    step(probe, "predict", torch.tensor([0, 1, 0]))
    assert manager.results["fit", "layers.0_fwd", "accuracy"] == 1
    assert manager.results["predict", "layers.0_fwd", "accuracy"] == torch.tensor(2 / 3)
    manager.reset_results()
    assert manager.results.is_empty()


@pytest.mark.parametrize("step_type", ["fit", "predict"])
def test_metrics_are_not_replaced_unless_allowed(step_type: str) -> None:
    manager = manager_of()
    probe = manager.probe_factory("a", "fwd")
    step(probe, "fit")
    if step_type == "predict":
        step(probe, "predict")
    with pytest.raises(ValueError, match=f"{step_type} metrics for 'a_fwd'.*reset_metrics.*allow_overwrite"):
        step(probe, step_type, 1 - Y)
    # A refused step leaves everything as it was.
    assert manager.estimators["a_fwd"].fits == 1
    assert manager.fit_metrics["a_fwd"] == {"accuracy": 1.0}
    manager.reset_metrics()
    step(probe, "fit", 1 - Y)
    assert torch.equal(manager.estimators["a_fwd"].labels, 1 - Y)


@pytest.mark.parametrize("options", [{"allow_overwrite": True}, {"overwrite_results": True}])
def test_metrics_are_replaced_if_allowed(options: dict[str, bool]) -> None:
    manager = manager_of(**options)
    probe = manager.probe_factory("a", "fwd")
    for labels in (Y, 1 - Y):
        step(probe, "fit", labels)
        step(probe, "predict", Y)
    assert manager.estimators["a_fwd"].fits == 2
    assert manager.predict_metrics == {"a_fwd": {"accuracy": 0.0}}


def test_a_known_estimator_is_refused_unless_allowed() -> None:
    manager = manager_of()
    first = manager.probe_factory("a", "fwd")
    step(first, "fit")
    with pytest.raises(ValueError, match="'a_fwd' already.*reset_estimators.*allow_overwrite"):
        manager.probe_factory("a", "fwd")
    manager.probe_factory("a", "bwd")
    kept = manager.estimators["a_fwd"]
    manager.reset_estimators()
    assert manager.estimators == {} and list(manager.fit_metrics) == ["a_fwd"]
    manager.probe_factory("a", "fwd")
    assert manager.estimators["a_fwd"] is not kept


def test_with_overwriting_a_fitted_estimator_survives() -> None:
    manager = manager_of(allow_overwrite=True)
    step(manager.probe_factory("a", "fwd"), "fit")
    fitted = manager.estimators["a_fwd"]
    step(manager.probe_factory("a", "fwd"), "predict")
    assert manager.estimators["a_fwd"] is fitted and manager.predict_metrics["a_fwd"] == {"accuracy": 1.0}
    manager.reset_estimators()
    manager.probe_factory("a", "fwd")
    assert manager.estimators["a_fwd"] is not fitted


def test_a_discarded_probe_leaves_no_estimator_but_a_fitted_one_stays() -> None:
    manager = manager_of(allow_overwrite=True)
    manager.probe_factory("a", "fwd").discard()
    assert manager.estimators == {}
    step(manager.probe_factory("a", "fwd"), "fit")
    manager.probe_factory("a", "fwd").discard()
    assert manager.estimators["a_fwd"].fits == 1


def test_preprocessing_reaches_the_estimator() -> None:
    seen = []
    manager = manager_of(data_preprocess_callback=lambda data: seen.append(data) or data)
    step(manager.probe_factory("a", "fwd"), "fit")
    assert seen[0] is X


def test_an_error_of_the_metrics_leaves_a_fitted_estimator() -> None:
    def fail(predictions: Any, labels: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    manager = ProbeManager(Parrot, {}, fail)
    with pytest.raises(ZeroDivisionError):
        step(manager.probe_factory("a", "fwd"), "fit")
    assert manager.estimators["a_fwd"].fits == 1 and manager.fit_metrics == {}


def test_managers_can_be_copied_and_pickled() -> None:
    manager = ProbeManager(LinearEstimator, {"d_latent": 3, "num_classes": 2, "epochs": 2}, share)
    step(manager.probe_factory("a", "fwd"), "fit")
    for twin in (copy.deepcopy(manager), pickle.loads(pickle.dumps(manager))):  # noqa: S301
        assert twin.fit_metrics == manager.fit_metrics
        twins, own = (m.estimators["a_fwd"].state_dict() for m in (twin, manager))
        assert all(torch.equal(twins[name], own[name]) for name in own)


# Pairs.

PAIRS = [("l.1", "l.2"), ("l.1", "l.10"), ("l.2", "l.2")]


def pairs_of(pairs: Any = PAIRS, **options: Any) -> BilinearProbeManager:
    return BilinearProbeManager(pairs, Parrot, {}, share, **options)


def test_the_pattern_matches_the_modules_of_the_pairs_and_no_other() -> None:
    pattern = pairs_of().key_pattern
    assert pattern == r"l\.1$|l\.10$|l\.2$"
    names = ["l.1", "l.2", "l.10", "l.100", "l.1.x", "lx1", "xl.1", "l"]
    assert [name for name in names if re.match(pattern, name)] == ["l.1", "l.2", "l.10"]
    with pytest.raises(AttributeError):
        pairs_of().key_pattern = "x"


def test_pairs_share_a_module_and_run_when_complete() -> None:
    manager = pairs_of()
    probes = {key: manager.probe_factory(key, "fwd") for key in ("l.1", "l.2", "l.10")}
    assert set(manager.estimators) == {"l.1_l.2_fwd", "l.1_l.10_fwd", "l.2_l.2_fwd"}
    manager.before_all()
    step(probes["l.2"], "fit")
    assert {key for key, e in manager.estimators.items() if e.fits} == {"l.2_l.2_fwd"}
    step(probes["l.1"], "fit")
    assert {key for key, e in manager.estimators.items() if e.fits} == {"l.2_l.2_fwd", "l.1_l.2_fwd"}
    with pytest.raises(ValueError, match=r"\['l.1', 'l.10'\].*\[\('l.1', 'l.10'\)\]"):
        manager.after_all()
    manager.after_all()
    assert set(manager.fit_metrics) == {"l.2_l.2_fwd", "l.1_l.2_fwd"}


def test_estimators_of_pairs_are_made_when_a_module_is_hooked() -> None:
    manager = pairs_of()
    assert manager.estimators == {}
    manager.probe_factory("l.10", "fwd_pre")
    assert set(manager.estimators) == {"l.1_l.10_fwd_pre"}
    assert manager.probe_factory("elsewhere", "fwd").step(X, labels=Y, step_type="fit") is None


def test_pairs_go_on_with_their_estimators_and_refuse_to_replace_metrics() -> None:
    manager = pairs_of([("a", "b")])
    for key in ("a", "b"):
        step(manager.probe_factory(key, "fwd"), "fit")
    fitted = manager.estimators["a_b_fwd"]
    step(manager.probe_factory("a", "fwd"), "fit")
    with pytest.raises(ValueError, match="fit metrics for 'a_b_fwd'"):
        step(manager.probe_factory("b", "fwd"), "fit")
    assert manager.estimators["a_b_fwd"] is fitted and fitted.fits == 1
    manager.reset_estimators()
    manager.probe_factory("a", "fwd")
    assert manager.estimators["a_b_fwd"] is not fitted and list(manager.fit_metrics) == ["a_b_fwd"]


def test_a_pair_given_twice_steps_once() -> None:
    manager = pairs_of([("a", "a"), ("a", "a")])
    step(manager.probe_factory("a", "fwd"), "fit")
    assert manager.estimators["a_a_fwd"].fits == 1


@pytest.mark.parametrize("pairs", [[], ["ab"], [("a",)], [("a", 1)], [("a", "b", "c")]])
def test_what_is_no_pair_of_names_is_refused(pairs: Any) -> None:
    with pytest.raises(ValueError, match="pair"):
        pairs_of(pairs)


def test_weights_made_under_inference_mode_can_be_trained() -> None:
    manager = ProbeManager(nn.Linear, {"in_features": 2, "out_features": 1}, share)
    with torch.inference_mode():
        manager.probe_factory("a", "fwd")
    assert not manager.estimators["a_fwd"].weight.is_inference()
