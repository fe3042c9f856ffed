"""The MIG family for 64 latents and 16 attributes: against latte-metrics, or scikit-learn's calls in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.harness import Bar, Measured, Setup, bench, interleave
from tdprobe.latent.disentanglement import dependency_aware, mig

FOUR = ("mig", "dmig", "dlig", "xmig")


def data(n: int, f: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw latents, and attributes that depend on several of them."""
    g = np.random.default_rng(0)
    z = g.normal(size=(n, f))
    return z, z[:, :m] + 0.3 * z[:, :m] @ g.normal(size=(m, m)) + 0.5 * g.normal(size=(n, m))


Peer = tuple[dict[str, Callable[[], np.ndarray]], bool]


def peer(z: np.ndarray, a: np.ndarray) -> Peer:
    """Return the four functions of latte-metrics 0.0.1a6, which installs with ``pip install --no-deps``.

    Without it, what they spend their time on: scikit-learn's estimate of as many pairs.

    Returns:
        What to call, and whether it is latte itself, whose values ours should be.
    """
    try:
        import latte
        from latte.functional.disentanglement import mutual_info
    except ImportError:
        return _pairs(z, a), False
    latte.seed(0)
    calls = {name: partial(getattr(mutual_info, name), z, a) for name in FOUR}
    return calls, True


def _pairs(z: np.ndarray, a: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    from sklearn.feature_selection import mutual_info_regression

    m = a.shape[1]

    def ask(latents: np.ndarray, extra: int) -> np.ndarray:
        # One more pair for an entropy, two for a conditional one.
        columns = [np.concatenate([latents, a[:, [i] * extra]], 1) for i in range(m)]
        found = [mutual_info_regression(columns[i], a[:, i], random_state=0) for i in range(m)]
        return np.stack(found)[:, : latents.shape[1]]

    sizes = {"mig": (z, 1), "dmig": (z, 2), "dlig": (z[:, :m], 2), "xmig": (z, 1)}
    return {name: partial(ask, *size) for name, size in sizes.items()}


@bench(
    "disentanglement",
    "the MIG family, n = 2,000, 64 latents, 16 attributes (reference: latte-metrics, or scikit-learn's calls in it)",
    {
        "mig less than latte": Bar("gain", 3),
        "four at once less than four calls": Bar("gain", 10),
        "largest difference in value": Bar("value", 1e-12),
    },
)
def disentanglement(setup: Setup) -> dict[str, Measured | str]:
    z, a = data(*((60, 5, 3) if setup.tiny else (2000, 64, 16)))
    calls, is_latte = peer(z, a)
    contenders = {"mig": lambda: mig(z, a), "four": lambda: dependency_aware(z, a)}
    times = interleave(contenders | {f"their {name}": call for name, call in calls.items()}, min(setup.rounds, 3))
    theirs = [sum(parts) for parts in zip(*(times[f"their {name}"] for name in FOUR), strict=True)]
    return {
        "mig less than latte": Measured(times["mig"], times["their mig"]),
        "four at once less than four calls": Measured(times["four"], theirs),
        "largest difference in value": _difference(z, a, calls) if is_latte else "latte-metrics not installed",
    }


def _difference(z: np.ndarray, a: np.ndarray, calls: dict[str, Callable[[], np.ndarray]]) -> Measured:
    ours = [mig(z, a), *list(dependency_aware(z, a).values())[1:]]
    largest = max(float(np.abs(call() - own).max()) for call, own in zip(calls.values(), ours, strict=True))
    return Measured([largest], [1.0], "")
