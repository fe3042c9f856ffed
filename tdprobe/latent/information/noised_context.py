"""A running measurement of noised layers: calibration, noise, rows, scores."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tdprobe.contexts import Site
from tdprobe.errors import StateError
from tdprobe.hooks.gate import in_backward
from tdprobe.latent.information.noise import FeatureMoments, NoiseLevels, draw
from tdprobe.latent.information.noised_estimator import BOUNDS, NoisedInformationEstimator
from tdprobe.latent.layer_stream import StreamContext
from tdprobe.latent.score_blocks import score_blocks
from tdprobe.latent.scorer import Scorer
from tdprobe.latent.scoring_options import DEFAULT_PORTION
from tdprobe.stream.batch import Batch
from tdprobe.stream.call import Call
from tdprobe.stream.edits import write_rows
from tdprobe.stream.outliers import without_outliers
from tdprobe.stream.rows import token_rows
from tdprobe.stream.tokens import Selection, tokens_text
from tdprobe.tables import ScoreTable

if TYPE_CHECKING:
    from tdprobe.latent.information.noised_information import NoisedInformation

REMEMBERED_CALLS = 64
# Number of a pass without noise.
QUIET = -1


class NoisedContext(StreamContext):
    """A running measurement: calibrate, then run the model as ever, then ask for the scores.

    What finished batches brought survives errors and the end of the block; entering again goes on from there, and
    draws the same noise again, pass by pass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        factory: NoisedInformation = self.factory  # ty: ignore[invalid-assignment]
        self._config = factory
        self._levels = None if factory.stds is None else NoiseLevels.given(factory.stds, factory.noise)
        self._moments: FeatureMoments | None = None
        self.reset()
        self._before_enter()

    def reset(self) -> None:
        """Forget every row that was scored."""
        size = self._config.bank_size
        # Rows come in units of the noise.
        estimators = {
            f"information_{bound}": NoisedInformationEstimator(noise=1.0, bound=bound, relative=False, bank_size=size)
            for bound in BOUNDS
        }
        self.scorer = Scorer(estimators, DEFAULT_PORTION, self._config.max_norm, groups=0)

    def _before_enter(self) -> None:
        self._n_passes, self._number = 0, QUIET
        self._runs: dict[str, int] = {}
        # What a backward pass may compute again under gradient checkpointing.
        self._passes: deque[tuple[int, Selection | None, dict[str, int]]] = deque(maxlen=REMEMBERED_CALLS)
        self._computed_again = False

    # Calibration.

    @contextmanager
    def calibrating(self) -> Generator[None]:
        """Learn the standard deviation of every feature from the passes in this block, which run without noise.

        A second block starts anew, and forgets the rows that were scored with other noise.

        Raises:
            StateError: Outside of the context or within such a block; at its end, if there are fewer than two rows,
                or a layer is constant or not finite.
        """
        self.require_active("calibrate")
        if self._moments is not None:
            raise StateError("this context is being calibrated already; leave that block first")
        self._moments, self._levels = FeatureMoments(), None
        self.reset()
        try:
            yield
            self._levels = self._moments.levels([site.name for site in self.sites], self._config.noise)
        finally:
            self._moments = None

    @property
    def stds(self) -> dict[str, Tensor]:
        """Standard deviations by layer, (features,) float64, as ``stds=`` takes them.

        Raises:
            StateError: They are not known yet.
        """
        return dict(self._known().stds)

    def _known(self) -> NoiseLevels:
        if self._levels is None:
            raise StateError(
                "how far the features of each layer vary is not known yet, and noise is in proportion to it; run some "
                "texts inside `with hooked.calibrating():` first, or pass stds="
            )
        return self._levels

    # Passes.

    def _begin(self, call: Call) -> None:
        if in_backward():
            return
        super()._begin(call)
        if self._computed_again:
            self._passes.clear()
            self._computed_again = False
        self._runs, self._number = {}, QUIET
        if self._moments is None and self._config.noise:
            self._known()
            self._number, self._n_passes = self._n_passes, self._n_passes + 1
        if torch.is_grad_enabled():
            self._passes.append((self._number, self._selection, self._runs))

    @torch.inference_mode(False)
    def consume(self, batch: Batch) -> None:
        """Take the rows of one finished forward pass, as they were before noise."""
        if self._moments is not None:
            self._moments.add(without_outliers(batch, self._config.max_norm))
        elif self._levels is not None and self._config.noise:
            self.scorer.push(Batch(self._levels.in_units(batch.rows), batch.ids))

    def run_of(self, site: Site, value: Tensor) -> Tensor | None:
        """Take the rows of a layer in the running pass and return its value with noise, if there is to be any."""
        self.add(site.name, value)
        self.fired(site)
        run = self._runs[site.name] = self._runs.get(site.name, 0) + 1
        return self._noised(site, value, self._number, self._selection, run)

    def rerun_of(self, site: Site, value: Tensor) -> Tensor | None:
        """Return a value that a backward pass has computed again with the noise that it had.

        Raises:
            StateError: Which pass is repeated cannot be told.
        """
        self._computed_again = True
        passes = list(self._passes)
        runs = max((runs.get(site.name, 0) for _, _, runs in passes), default=0)
        if len(passes) == 1 and runs == 1:
            number, selection, _ = passes[0]
            return self._noised(site, value, number, selection, 1)
        if all(number == QUIET for number, _, _ in passes):
            return None
        raise StateError(
            f"gradient checkpointing repeats {site.name!r}, which ran {runs} times in a pass, in one of {len(passes)} "
            "forward passes, and each had noise of its own; call backward after each pass, or do not checkpoint layers "
            "that run more than once"
        )

    def _noised(self, site: Site, value: Tensor, number: int, selection: Selection | None, run: int) -> Tensor | None:
        if number == QUIET:
            return None
        rows = value.reshape(len(value), -1) if selection is None else token_rows(site.name, value, selection)
        if not len(rows):
            return None
        noise = draw(rows, self._config.seed, site.name, number, run)
        new = rows + noise * self._known().of(site.name, rows)
        if selection is None:
            return new.to(value.dtype).reshape(value.shape)
        return write_rows(site.name, value, selection, new)

    # Results.

    def scores(self) -> ScoreTable:
        """Bound the information of every layer from the rows so far; the stream can go on afterwards.

        Returns:
            ``"information_lower"`` and ``"information_upper"``, nats per token, by layer; ``meta["log_rows"]`` is the
            most that could be.

        Raises:
            StateError: No row has come, or there is no noise.
        """
        config = self._config
        if not config.noise:
            raise StateError("with noise=0 nothing is lost, so there is nothing to measure; give noise above 0")
        labels = [(config.name, layer) for layer in self.scorer.layers]
        scored = self.scorer.scored()
        facts = {key: value for key, value in self.scorer.facts().items() if key != "estimators"}
        meta = {
            "model": type(self.model).__name__,
            "layers": config.key_pattern,
            "tokens": tokens_text(config.clause.tokens),
            "skip_first": config.clause.skip_first,
            "noise": config.noise,
            "seed": config.seed,
            "calibration_rows": self._known().n,
            "log_rows": math.log(max(each.n for each in scored.values())),
        }
        return ScoreTable(score_blocks(scored, self.scorer.estimators, labels), meta | facts)
