"""One estimator per pair of modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tdprobe.errors import ConfigError
from tdprobe.latent.probing.probe_manager import Metrics, ProbeManager
from tdprobe.latent.probing.probes import BilinearProbe


class PairDispatcher:
    """Hand what one module gives to every pair that it is part of.

    Args:
        key: Name of the module.
        probes: Probes of its pairs.
    """

    def __init__(self, key: str, probes: Sequence[BilinearProbe]) -> None:
        self.key = key
        self.probes = tuple(probes)

    def step(self, data: Any, **kwargs: Any) -> None:
        """Step every probe."""
        for probe in self.probes:
            probe.step(data, key=self.key, **kwargs)


class BilinearProbeManager(ProbeManager):
    """Make a probe for every pair of modules; a module may be part of many pairs.

    Use ``Probing(manager.key_pattern, manager.probe_factory, additional_keys=["labels", "step_type"])``. Keys
    are ``f"{h1}_{h2}_{direction}"``. A block that is entered again goes on with the same estimators.

    Args:
        pairs: Pairs of module names.
        estimator_class: Called with ``estimator_kwargs`` for each pair; see :class:`BilinearProbe`.
        estimator_kwargs: Its keywords.
        compute_metrics: ``compute_metrics(predictions, labels)`` gives a dict.
        allow_overwrite: Let later steps replace metrics.
        data_preprocess_callback: See :class:`Probe`.
        overwrite_results: Another name of ``allow_overwrite``.

    Raises:
        ConfigError: There is no pair, or an item is no pair of names.

    References:
        Hewitt, Manning 2019, A structural probe for finding syntax in word representations (a bilinear form);
        White et al. 2021, A non-linear structural probe.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        estimator_class: Callable[..., Any],
        estimator_kwargs: Mapping[str, Any],
        compute_metrics: Metrics,
        allow_overwrite: bool = False,
        data_preprocess_callback: Callable[[Any], Any] | None = None,
        *,
        overwrite_results: bool | None = None,
    ) -> None:
        super().__init__(
            estimator_class,
            estimator_kwargs,
            compute_metrics,
            allow_overwrite,
            data_preprocess_callback,
            overwrite_results=overwrite_results,
        )
        self._pairs = [_checked(pair) for pair in pairs]
        if not self._pairs:
            raise ConfigError(
                "pairs is empty; give at least one pair of module names, such as ('layers.0', 'layers.1')"
            )
        self._pair_probes: dict[tuple[str, str, str], BilinearProbe] = {}

    @property
    def key_pattern(self) -> str:
        """Pattern that matches the modules of all pairs and no other."""
        return "|".join(re.escape(key) + "$" for key in sorted({key for pair in self._pairs for key in pair}))

    def probe_factory(self, key: str, direction: str) -> PairDispatcher:  # ty: ignore[incompatible-method-override]
        """Return the probe of a module, which hands what it gets to the pairs of that module."""
        pairs = dict.fromkeys(pair for pair in self._pairs if key in pair)
        return PairDispatcher(key, [self._pair_probe(*pair, direction) for pair in pairs])

    def before_all(self) -> None:
        """Forget every value that waits for its partner, at the start of a run."""
        for probe in self._pair_probes.values():
            probe.before_all()

    def after_all(self) -> None:
        """End a run.

        Raises:
            ConfigError: A value never met its partner; the keys and pairs are listed.
        """
        waiting = [pair for probe in self._pair_probes.values() for pair in probe.after_all()]
        if waiting:
            keys = sorted({key for pair in waiting for key in pair})
            raise ConfigError(
                f"bilinear probes still wait for one of the keys {keys}; unresolved pairs: {waiting}. "
                "Did both modules run, and does Probing hook both (key_pattern=manager.key_pattern)?"
            )

    def reset_estimators(self) -> None:
        """Throw all estimators away; metrics stay."""
        super().reset_estimators()
        self._pair_probes = {}

    def _pair_probe(self, h1: str, h2: str, direction: str) -> BilinearProbe:
        found = self._pair_probes.get((h1, h2, direction))
        if found is None:
            name = f"{h1}_{h2}_{direction}"
            callbacks = self._callbacks(name)
            found = BilinearProbe(h1, h2, self._estimator(name), *callbacks, self._data_preprocess_callback)
            found._admit = self._admission(name)
            self._pair_probes[h1, h2, direction] = found
        return found


def _checked(pair: Any) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(key, str) for key in pair):
        raise ConfigError(f"pairs holds pairs of module names, got {pair!r}")
    return (pair[0], pair[1])
