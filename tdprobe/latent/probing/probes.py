"""What is done with the data of one hook, or of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.hooks import keep
from tdprobe.latent.probing.fitting import as_rows, own_mode, readable

STEPS = ("fit", "predict")
Callback = Callable[[Any, Any], Any]


class Probe:
    """Fit an estimator on what a hook sees, or let it predict.

    Args:
        estimator: Anything with ``fit(data, y=labels)`` and ``predict(data)``: a :class:`TorchEstimator`, a
            scikit-learn estimator (on the CPU), ...
        predict_callback: Called with (predictions, labels) after a step of type ``"predict"``.
        fit_callback: Called with (predictions on the fitted data, labels) after a step of type ``"fit"``.
        data_preprocess_callback: From the hook's value to what the estimator gets. By default the first
            tensor, detached, at least float32, and flattened to one row per sample.

    Example:
        >>> import torch
        >>> from sklearn.dummy import DummyClassifier
        >>> probe = Probe(DummyClassifier(), lambda predictions, labels: print(predictions, labels.tolist()))
        >>> probe.step(torch.zeros(3, 2), labels=torch.tensor([1, 0, 1]), step_type="fit")
        >>> probe.step(torch.zeros(2, 2), labels=torch.tensor([1, 0]), step_type="predict")
        [1 1] [1, 0]
    """

    def __init__(
        self,
        estimator: Any,
        predict_callback: Callback,
        fit_callback: Callback | None = None,
        data_preprocess_callback: Callable[[Any], Any] | None = None,
    ) -> None:
        self._estimator = estimator
        self._predict_callback = predict_callback
        self._fit_callback = fit_callback
        self._data_preprocess_callback = data_preprocess_callback or as_rows
        # Set by managers: refuse a step whose result could not be kept, forget a probe that was never hooked.
        self._admit: Callable[[str], None] = _admit_all
        self._discard: Callable[[], None] | None = None

    def step(self, data: Any, **kwargs: Any) -> None:
        """Fit or predict.

        Args:
            data: What the hook got.
            kwargs: ``labels`` and ``step_type`` (``"fit"`` or ``"predict"``); others are ignored.

        Raises:
            ConfigError: ``step_type`` is neither.
        """
        labels, step_type = kwargs.get("labels"), _checked(kwargs.get("step_type"))
        self._admit(step_type)
        self._run((self._data_preprocess_callback(data),), labels, step_type)

    def discard(self) -> None:
        """Undo the making of a probe whose hook could not be installed."""
        if self._discard is not None:
            self._discard()

    def _run(self, inputs: tuple[Any, ...], labels: Any, step_type: str) -> None:
        *rows, labels = readable(self._estimator, (*inputs, labels))
        with own_mode(grad=False):
            if step_type == "fit":
                with own_mode(grad=True):
                    self._estimator.fit(*rows, y=labels)
            callback = self._fit_callback if step_type == "fit" else self._predict_callback
            if callback is not None:
                callback(self._estimator.predict(*rows), labels)


class BilinearProbe(Probe):
    """Fit an estimator on two activations of the same pass: ``fit(h1, h2, y=labels)``, ``predict(h1, h2)``.

    The value that comes first is kept until the other one is there.

    Args:
        h1_key: Name of the first module.
        h2_key: Name of the second; the same name gives the value twice, at once.
        estimator: Anything with ``fit(h1, h2, y=labels)`` and ``predict(h1, h2)``.
        predict_callback: As for :class:`Probe`.
        fit_callback: As for :class:`Probe`.
        data_preprocess_callback: As for :class:`Probe`, applied to either value.
    """

    def __init__(
        self,
        h1_key: str,
        h2_key: str,
        estimator: Any,
        predict_callback: Callback,
        fit_callback: Callback | None = None,
        data_preprocess_callback: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(estimator, predict_callback, fit_callback, data_preprocess_callback)
        self._h1_key = h1_key
        self._h2_key = h2_key
        self._cached: dict[str, Any] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether one of two values is there."""
        return bool(self._cached)

    def step(self, data: Any, key: str, labels: Any, step_type: str, **kwargs: Any) -> None:  # ty: ignore[incompatible-method-override]
        """Take one value, and fit or predict once both are there.

        Args:
            data: What the hook got.
            key: Which module it is from; a key that is none of the two is ignored.
            labels: Labels of the pass.
            step_type: ``"fit"`` or ``"predict"``; looked at when the pair is complete.
            kwargs: Ignored.

        Raises:
            ConfigError: ``step_type`` is neither.
        """
        if key not in (self._h1_key, self._h2_key):
            return
        value = self._data_preprocess_callback(data)
        # The model goes on while the first value waits, and may write into it.
        self._cached[key] = keep(value) if isinstance(value, Tensor) else value
        if self._h1_key in self._cached and self._h2_key in self._cached:
            inputs = (self._cached[self._h1_key], self._cached[self._h2_key])
            self._cached.clear()
            self._admit(_checked(step_type))
            self._run(inputs, labels, step_type)

    def before_all(self) -> None:
        """Forget what waits, at the start of a run."""
        self._cached.clear()

    def after_all(self) -> list[tuple[str, str]]:
        """End a run: return ``[(h1_key, h2_key)]`` if one value still waits for the other, and forget it."""
        waiting = self.is_waiting
        self._cached.clear()
        return [(self._h1_key, self._h2_key)] if waiting else []


def _admit_all(step_type: str) -> None:
    """Refuse nothing."""


def _checked(step_type: Any) -> str:
    if step_type not in STEPS:
        raise ConfigError(f"step_type must be 'fit' or 'predict', got {step_type!r}")
    return step_type
