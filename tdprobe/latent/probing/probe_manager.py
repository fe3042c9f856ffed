"""One estimator per module and direction, with its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict

from tdprobe.errors import ConfigError
from tdprobe.latent.probing.probes import Callback, Probe

Metrics = Callable[[Any, Any], dict[str, Any]]


class ProbeManager:
    """Make a probe for every module that :class:`Probing` hooks, and keep estimators and metrics by name.

    Keys are ``f"{name}_{direction}"``. Estimators and metrics outlive the block. A block that is entered
    again goes on with the same estimators if ``allow_overwrite``; otherwise it needs :meth:`reset_estimators`
    first.

    Args:
        estimator_class: Called with ``estimator_kwargs`` for each key.
        estimator_kwargs: Its keywords.
        compute_metrics: ``compute_metrics(predictions, labels)`` gives a dict, kept after each fit and each
            predict.
        allow_overwrite: Let later steps replace metrics, and later blocks go on with fitted estimators.
        data_preprocess_callback: See :class:`Probe`.
        overwrite_results: Another name of ``allow_overwrite``.

    Example:
        >>> from sklearn.dummy import DummyClassifier
        >>> manager = ProbeManager(DummyClassifier, {}, lambda p, y: {"accuracy": (p == y.numpy()).mean()})
        >>> manager.probe_factory("0", "fwd").step(torch.zeros(2, 3), labels=torch.tensor([1, 1]), step_type="fit")
        >>> list(manager.estimators), float(manager.fit_metrics["0_fwd"]["accuracy"])
        (['0_fwd'], 1.0)
    """

    def __init__(
        self,
        estimator_class: Callable[..., Any],
        estimator_kwargs: Mapping[str, Any],
        compute_metrics: Metrics,
        allow_overwrite: bool = False,
        data_preprocess_callback: Callable[[Any], Any] | None = None,
        *,
        overwrite_results: bool | None = None,
    ) -> None:
        self._estimator_class = estimator_class
        self._estimator_kwargs = dict(estimator_kwargs)
        self._compute_metrics = compute_metrics
        self._allow_overwrite = allow_overwrite if overwrite_results is None else overwrite_results
        self._data_preprocess_callback = data_preprocess_callback
        self._estimators: dict[str, Any] = {}
        self._fit_metrics: dict[str, Any] = {}
        self._predict_metrics: dict[str, Any] = {}

    @property
    def estimators(self) -> dict[str, Any]:
        """Estimators by key."""
        return self._estimators

    @property
    def fit_metrics(self) -> dict[str, Any]:
        """Metrics of the last fit by key."""
        return self._fit_metrics

    @property
    def predict_metrics(self) -> dict[str, Any]:
        """Metrics of the last prediction by key."""
        return self._predict_metrics

    @property
    def results(self) -> TensorDict:
        """All metrics as one TensorDict: ``results["predict", key, "accuracy"]``."""
        found = {"fit": self._fit_metrics, "predict": self._predict_metrics}
        return TensorDict({phase: dict(metrics) for phase, metrics in found.items() if metrics})

    def probe_factory(self, key: str, direction: str) -> Probe:
        """Return the probe of a module and direction; pass this method to :class:`Probing`.

        Raises:
            ConfigError: There is an estimator for it already, and ``allow_overwrite`` is off.
        """
        name = f"{key}_{direction}"
        known = name in self._estimators
        if known and not self._allow_overwrite:
            raise ConfigError(
                f"there is an estimator for {name!r} already; reset_estimators() throws all of them away, "
                "allow_overwrite=True goes on with them"
            )
        probe = Probe(self._estimator(name), *self._callbacks(name), self._data_preprocess_callback)
        probe._admit = self._admission(name)
        probe._discard = None if known else lambda: self._estimators.pop(name, None)
        return probe

    def reset_estimators(self) -> None:
        """Throw all estimators away; metrics stay."""
        self._estimators = {}

    def reset_metrics(self) -> None:
        """Throw all metrics away; estimators stay."""
        self._fit_metrics = {}
        self._predict_metrics = {}

    reset_results = reset_metrics

    def _estimator(self, name: str) -> Any:
        if name not in self._estimators:
            # Weights made under the model's inference mode could never be trained.
            with torch.inference_mode(False):
                self._estimators[name] = self._estimator_class(**self._estimator_kwargs)
        return self._estimators[name]

    def _callbacks(self, name: str) -> tuple[Callback, Callback]:
        def on_predict(predictions: Any, labels: Any) -> None:
            self._predict_metrics[name] = self._compute_metrics(predictions, labels)

        def on_fit(predictions: Any, labels: Any) -> None:
            self._fit_metrics[name] = self._compute_metrics(predictions, labels)

        return on_predict, on_fit

    def _admission(self, name: str) -> Callable[[str], None]:
        def admit(step_type: str) -> None:
            metrics = self._fit_metrics if step_type == "fit" else self._predict_metrics
            # Asked before the step: a refused fit leaves the fitted estimator as it is.
            if name in metrics and not self._allow_overwrite:
                raise ConfigError(
                    f"there are {step_type} metrics for {name!r} already; reset_metrics() throws all of them "
                    "away, allow_overwrite=True lets each step replace them"
                )

        return admit
