"""The samples that activate a unit most, with the text around each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdprobe.errors import ConfigError, StateError, unknown
from tdprobe.latent.layer_stream import LayerStreaming, StreamContext
from tdprobe.stats.topk import TopK, TopKState
from tdprobe.stream.batch import Batch
from tdprobe.stream.call import Call

# A row id holds the number of its sample above this many bits, and its position plus one below them.
POSITION_BITS = 21


class Activation(NamedTuple):
    """One of the largest activations of a unit.

    Attributes:
        value: The activation.
        sample: Number of the sample, as set by ``set_sample_ids``, else counted in the order of the calls.
        position: Position among the real tokens of the sample; -1 where rows are no single tokens.
    """

    value: float
    sample: int
    position: int


@dataclass(frozen=True)
class TopSamples:
    """Hold the largest activations of every unit of some layers; a value that merges with others of its kind.

    Attributes:
        layers: Names, in the order of ``state``.
        state: What the stream left behind.
    """

    layers: tuple[str, ...]
    state: TopKState

    def of(self, layer: str, unit: int) -> list[Activation]:
        """Return the largest activations of one unit, largest first.

        Raises:
            ConfigError: There is no such layer or unit.
        """
        if layer not in self.layers:
            raise ConfigError(unknown("layer", layer, self.layers))
        key = str(self.layers.index(layer))
        values, ids = self.state.top[key], self.state.ids[key]
        if not -len(values) <= unit < len(values):
            raise ConfigError(f"{layer!r} has the units 0 to {len(values) - 1}, got {unit}")
        return [Activation(v, *_parts(i)) for v, i in zip(values[unit].tolist(), ids[unit].tolist(), strict=True)]

    def values(self, layer: str) -> Tensor:
        """Return the largest activations of all units of a layer, (units, k), largest first."""
        if layer not in self.layers:
            raise ConfigError(unknown("layer", layer, self.layers))
        return self.state.top[str(self.layers.index(layer))]

    def merge(self, other: TopSamples) -> TopSamples:
        """Return what one stream over the samples of both would have left.

        Raises:
            ConfigError: The layers differ.
        """
        if self.layers != other.layers:
            raise ConfigError(f"cannot merge the layers {list(self.layers)} with {list(other.layers)}")
        return TopSamples(self.layers, self.state.merge(other.state))


class MaxActivatingContext(StreamContext):
    """A running search, whose findings survive errors, interrupts and the end of the block."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state: TopKState | None = None
        self._layers: tuple[str, ...] = ()
        self._current = torch.zeros(0, dtype=torch.int64, device="cpu")

    def samples(self) -> TopSamples:
        """Return what has been found so far; the stream can go on afterwards.

        Raises:
            StateError: Nothing has been seen.
        """
        if self._state is None:
            raise StateError("no row has been seen yet: run the model inside the block first")
        return TopSamples(self._layers, self._state)

    def reset(self) -> None:
        """Forget everything."""
        self._state, self._n_samples = None, 0

    def consume(self, batch: Batch) -> None:
        """Take the rows of one finished forward pass."""
        statistic = TopK(self.factory.k)  # ty: ignore[missing-attribute]
        rows = list(batch.rows.values())
        if self._state is None:
            self._state, self._layers = statistic.init(rows, batch.ids), tuple(batch.rows)
        if tuple(batch.rows) != self._layers:
            raise ConfigError(
                f"layers must run in every forward pass; before: {self._layers}, now: {tuple(batch.rows)}"
            )
        self._state = statistic.update(self._state, rows, batch.ids)

    def _ids(self, call: Call, n: int) -> Tensor:
        size, selection = call.shape[0] if call.shape else n, self._selection
        if call.phase != "generated":
            counted = torch.arange(self._n_samples, self._n_samples + size, device="cpu")
            self._current = counted if self._samples is None else self._samples.cpu()
            self._n_samples += size
        if len(self._current) and (int(self._current.min()) < 0 or int(self._current.max()) >> (63 - POSITION_BITS)):
            raise ConfigError(
                f"sample ids are numbers from 0 to 2^{63 - POSITION_BITS} - 1, such as indices of a list of texts"
            )
        if selection is None:
            return self._current << POSITION_BITS
        return (self._current[selection.sample] << POSITION_BITS) + selection.position + 1


class MaxActivating(LayerStreaming):
    """Find the tokens that activate each unit of some layers most, in one pass and bounded memory.

    Number the samples by ``context.set_sample_ids(ids)`` before each call, so that they can be found again.

    Args:
        key_pattern: Regular expression matched from the start of the dotted module name.
        k: Activations to keep per unit.
        relative: Names start at the user's model; ``False`` starts them at the wrapper (``td_module.module``).
        tokens: Which tokens of each row count; see :class:`tdprobe.stream.tokens.TokenClause`.
        skip_first: Real tokens at the start of each row that never count. The first one activates many units
            of decoder models more than any other, whatever it is.
        early_stop: End calls of the hooked module after the last layer.
        required: A pattern that matches nothing, or layers that never run, are errors.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Identity())
        >>> with MaxActivating("0", k=2).prepare(model) as hooked:
        ...     out = hooked(torch.tensor([[1.0], [5.0], [3.0]]))
        >>> [(a.value, a.sample) for a in hooked.hooking_context.samples().of("0", 0)]
        [(5.0, 1), (3.0, 2)]
    """

    _hooking_context_class = MaxActivatingContext

    def __init__(
        self,
        key_pattern: str,
        k: int = 10,
        *,
        relative: bool = True,
        tokens: Any = "all",
        skip_first: int = 1,
        early_stop: bool = False,
        required: bool = True,
    ) -> None:
        super().__init__(
            key_pattern,
            relative=relative,
            tokens=tokens,
            skip_first=skip_first,
            early_stop=early_stop,
            required=required,
        )
        self.k = TopK(k).k


def text_around(tokenizer: Any, text: str, position: int, width: int = 8, **options: Any) -> tuple[str, str, str]:
    """Return the text before, at and after a token.

    Args:
        tokenizer: The one that made the model's inputs.
        text: The sample.
        position: Position of the token among the tokens of the sample.
        width: Tokens to show on either side.
        options: Those of the tokenizer's call that made the inputs, such as ``add_special_tokens``.

    Raises:
        ConfigError: The text has no such token.
    """
    ids: Sequence[int] = tokenizer(text, **options)["input_ids"]
    if not 0 <= position < len(ids):
        raise ConfigError(f"position {position} is none of the {len(ids)} tokens of {text!r}")
    parts = ids[max(0, position - width) : position], ids[position : position + 1], ids[position + 1 :][:width]
    before, token, after = (tokenizer.decode(part) for part in parts)
    return before, token, after


def _parts(row: int) -> tuple[int, int]:
    return row >> POSITION_BITS, (row & ((1 << POSITION_BITS) - 1)) - 1
