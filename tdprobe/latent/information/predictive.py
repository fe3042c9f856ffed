"""What a probe that was fitted to some rows says of the targets of others: the surprise of each, in nats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.latent.probing.fitting import own_mode
from tdprobe.latent.probing.torch_estimator import TorchEstimator

Array = np.ndarray[Any, Any]
# Makes an unfitted probe from the width of rows and the number of classes, None for numbers.
MakeProbe = Callable[[int, int | None], TorchEstimator]

# Penalties of half the squared weights, in units of the mean loss of a row, for standardised columns.
PENALTIES = 10.0 ** -np.arange(0, 5)
RIDGES = 10.0 ** np.arange(-5, 3)
# Every so many rows of those to fit to are set aside where something has to be chosen.
ASIDE = 5
# The variance around a prediction, as a share of that of the targets, is not below this: 13.8 nats at most.
LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Family:
    """Hold a predictive family: linear probes, or those that the user makes.

    Classes are predicted by softmax regression, numbers by a Gaussian around ridge regression, both for columns of
    mean 0 and variance 1. Penalties are chosen among the rows to fit to. Every probability of a class is mixed with
    the uniform one, as if half a row of each class had been seen besides (Krichevsky, Trofimov): a class that is
    missing among the rows to fit to is no infinite surprise.

    Args:
        classes: How many classes, numbered 0, 1, ...; ``None`` for numbers.
        make: Makes another probe, from the width and the number of classes.
        seed: Of the probes of ``make``.
    """

    classes: int | None
    make: MakeProbe | None = None
    seed: int = 0

    def blind(self, y: Array, held: Array) -> Array:
        """Return the surprise of targets ``held`` for one who has seen the targets ``y`` and no rows."""
        if self.classes is None:
            mean, variance = y.mean(), y.var() * (len(y) / (len(y) - 1)) ** 2
            return _gaussian(held - mean, variance)
        shares = np.bincount(y.astype(int), minlength=self.classes) / len(y)
        return _of_class(np.broadcast_to(shares, (len(held), self.classes)), held, len(y))

    def seeing(self, x: Array, y: Array, rows: Array, held: Array) -> Array:
        """Return the surprise of targets ``held`` for one who sees their ``rows``, fitted to ``x`` and ``y``."""
        mean, spread = x.mean(0), x.std(0)
        # The spread of a constant column is rounding.
        spread = np.where(spread > 1e-12 * (np.abs(mean) + spread), spread, 1.0)
        x, rows = (x - mean) / spread, (rows - mean) / spread
        if self.classes is None:
            return self._of_number(x, y, rows, held)
        present = np.unique(y).astype(int)
        table = np.zeros((len(held), self.classes))
        # One class is all that can be learned of.
        fitted = self._softmax(x, y, rows, present) if len(present) > 1 else 1.0
        table[:, present] = fitted
        return _of_class(table, held, len(y))

    def _softmax(self, x: Array, y: Array, rows: Array, present: Array) -> Array:
        if self.make is not None:
            labels = torch.from_numpy(np.searchsorted(present, y))
            return _answers(self._fitted(self.make, x, labels, len(present)), rows).softmax(-1).numpy()
        model = _logistic(_penalty(x, y), len(y))
        return model.fit(x, y).predict_proba(rows)

    def _of_number(self, x: Array, y: Array, rows: Array, held: Array) -> Array:
        least = LEAST_VARIANCE * y.var()
        if self.make is None:
            from sklearn.linear_model import RidgeCV

            # Its error is that of leaving each row out, so that wide rows do not look better than they are.
            model = RidgeCV(alphas=len(y) * RIDGES).fit(x, y)
            return _gaussian(held - model.predict(rows), max(-model.best_score_, least))
        aside = _set_aside(len(y))
        mean, spread = y.mean(), y.std() or 1.0
        targets = torch.from_numpy((y - mean) / spread)[:, None]
        probe = self._fitted(self.make, x[~aside], targets[torch.from_numpy(~aside)], None)
        guess, other = (mean + spread * _answers(probe, z).numpy()[:, 0] for z in (x[aside], rows))
        return _gaussian(held - other, max(np.square(y[aside] - guess).mean(), least))

    def _fitted(self, make: MakeProbe, x: Array, y: Tensor, classes: int | None) -> TorchEstimator:
        # Of GPUs that nobody uses yet, torch.manual_seed would set the seed for good.
        used = torch.cuda.is_initialized()
        with torch.random.fork_rng(range(torch.cuda.device_count()) if used else []):
            (torch.manual_seed if used else torch.default_generator.manual_seed)(self.seed)
            probe = make(x.shape[1], classes)
            return probe.fit(_beside(probe, x), y=y.to(_device(probe))).eval()


def _answers(probe: TorchEstimator, rows: Array) -> Tensor:
    """Return the output of a probe, float64."""
    with own_mode(grad=False):
        return probe(probe._cast(_beside(probe, rows))).double().cpu()


def _beside(probe: TorchEstimator, rows: Array) -> Tensor:
    return torch.from_numpy(rows).to(_device(probe))


def _device(probe: TorchEstimator) -> torch.device:
    return next((parameter.device for parameter in probe.parameters()), torch.device("cpu"))


def _gaussian(error: Array, variance: float) -> Array:
    """Return minus the logarithm of the density; NaN for targets that are constant."""
    if not variance > 0:
        return np.full_like(error, np.nan)
    return 0.5 * (np.log(2 * np.pi * variance) + np.square(error) / variance)


def _of_class(table: Array, held: Array, n: int) -> Array:
    """Return minus the logarithm of the probabilities of classes, after n rows."""
    picked = table[np.arange(len(held)), held.astype(int)]
    return -np.log((n * picked + 0.5) / (n + table.shape[1] / 2))


def _set_aside(n: int) -> Array:
    return np.arange(n) % ASIDE == ASIDE - 1


def _logistic(penalty: float, n: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / (penalty * n), tol=1e-7, max_iter=1000, warm_start=True)


def _penalty(x: Array, y: Array) -> float:
    """Choose the penalty, from strong to weak, at which rows that are set aside surprise least."""
    aside = _set_aside(len(y))
    seen = np.unique(y[~aside])
    tried = aside & np.isin(y, seen)
    if len(seen) < 2 or not tried.any():
        return PENALTIES[0]
    model, best, chosen = _logistic(PENALTIES[0], int((~aside).sum())), np.inf, PENALTIES[0]
    for penalty in PENALTIES:
        model.set_params(C=1 / (penalty * (~aside).sum())).fit(x[~aside], y[~aside])
        table = model.predict_proba(x[tried])
        loss = _of_class(table, np.searchsorted(seen, y[tried]), int((~aside).sum())).mean()
        if not loss < best:
            break
        best, chosen = loss, penalty
    return chosen


def canonical(x: Array, y: Array) -> Array:
    """Order rows by target, then by content: the order in which they came, and that of columns, does not matter."""
    spread = x.std(0)
    key = ((x - x.mean(0)) / np.where(spread > 0, spread, 1.0)).sum(1)
    return np.lexsort((key, y))


def check_probe(probe: Any) -> Any:
    """Return what makes probes, or say what it has to be.

    Raises:
        ConfigError: It cannot be called.
    """
    if probe is not None and not callable(probe):
        raise ConfigError(
            f"got probe={probe!r}; allowed are None, for linear probes, and what makes an unfitted TorchEstimator from "
            "the width of rows and the number of classes (None for numbers), such as lambda d, k: "
            "LinearEstimator(d, num_classes=k)"
        )
    return probe
