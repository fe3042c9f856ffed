"""The one selection clause: which tokens of a row count."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdprobe.errors import ConfigError, unknown
from tdprobe.stream.call import Call

WORDS = ("last", "mean", "all", "prompt", "generated")
Tokens = str | int | slice | range | Sequence[int | slice] | Tensor | Callable[[Call], Tensor]

_SPAN = re.compile(r"(-?\d+)?:(-?\d+)?")


@dataclass(frozen=True)
class Selection:
    """Which rows of a (batch, tokens, ...) value a clause takes; shared by every layer of a call.

    Attributes:
        shape: (batch, tokens) of the call.
        index: (n,) positions in the flattened (batch * tokens) axis, or ``None`` for all of them.
        averaged: (batch, tokens) bool, the tokens of each row's mean, or ``None``.
        sample: (n,) row of the batch that each selected row comes from.
        position: (n,) its position among the real tokens of that row; -1 for a mean.
    """

    shape: tuple[int, int]
    index: Tensor | None
    averaged: Tensor | None
    sample: Tensor
    position: Tensor

    @property
    def n(self) -> int:
        """Count the selected rows."""
        return self.sample.shape[0]

    def take(self, value: Tensor) -> Tensor:
        """Select rows.

        Args:
            value: (batch, tokens, ...), or (batch * tokens, ...).

        Returns:
            (n, width): trailing axes are flattened into the width.
        """
        batch, tokens = self.shape
        if self.averaged is not None:
            return self._average(value.reshape(batch, tokens, -1))
        flat = value.reshape(batch * tokens, -1)
        return flat if self.index is None else flat.index_select(0, self.index.to(value.device))

    def _average(self, value: Tensor) -> Tensor:
        counted = self.averaged[self.sample].to(value.device)  # ty: ignore[not-subscriptable]
        wide = value[self.sample.to(value.device)]
        wide = wide if wide.dtype == torch.float64 else wide.float()
        # Pads are zeroed, not only weighted by zero: a NaN there would survive the product.
        wide = wide.masked_fill(~counted.unsqueeze(-1), 0)
        return wide.sum(1) / counted.sum(1, keepdim=True)


@dataclass(frozen=True)
class TokenClause:
    """Say which tokens count.

    Positions are those of the row's real tokens, whichever side is padded: 0 is the first real token, -1 the last.

    Args:
        tokens: ``"last"``, ``"mean"`` or ``"all"`` of the real tokens; ``"prompt"`` or ``"generated"`` ones in
            ``generate()``; an int or several (negative from the end); a span as ``slice``, ``range`` or
            ``"start:stop"``; a (batch, tokens) bool mask; or a callable that gets the
            :class:`~tdprobe.stream.call.Call` and returns such a mask.
        skip_first: Real tokens at the start of each row that never count.
        may_miss: A batch without any such token gives no rows, instead of an error.

    Raises:
        ConfigError: The clause is none of these.
    """

    tokens: Any = "all"
    skip_first: int = 0
    may_miss: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.skip_first, bool) or not isinstance(self.skip_first, int) or self.skip_first < 0:
            raise ConfigError(f"skip_first counts tokens (an int of at least 0), got {self.skip_first!r}")
        if isinstance(self.tokens, range):
            object.__setattr__(self, "tokens", _of_range(self.tokens))
        if isinstance(self.tokens, str) and self.tokens not in WORDS:
            object.__setattr__(self, "tokens", _parse_span(self.tokens))
        elif isinstance(self.tokens, Sequence) and not isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", tuple(self.tokens))
            if not self.tokens or not all(_is_position(t) or isinstance(t, slice) for t in self.tokens):
                raise ConfigError(f"tokens as a sequence holds ints or slices, got {list(self.tokens)!r}")
        elif not (isinstance(self.tokens, (str, slice, Tensor)) or _is_position(self.tokens) or callable(self.tokens)):
            raise ConfigError(
                f"tokens is one of {', '.join(map(repr, WORDS))}, an int, ints, a slice, 'start:stop', a bool mask "
                f"or a callable; got {self.tokens!r}"
            )
        parts = self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)
        for part in parts:
            if isinstance(part, slice) and not _is_span(part):
                raise ConfigError(f"a span of tokens has int edges and a step of at least 1, got {part!r}")

    @property
    def asks(self) -> str:
        """Say what texts must have for any row to come of them, to end the sentence of an error."""
        return f", on texts with tokens that tokens={tokens_text(self.tokens)!r} and skip_first={self.skip_first} leave"

    def select(self, call: Call) -> Selection:
        """Resolve the clause for one forward pass.

        Raises:
            ConfigError: It matches no token of the batch, or the padding cannot be told.
        """
        # By identity, since a mask has no hash; the clause is kept as well, or its id could pass to another one.
        known = call.selections.get(id(self))
        if known is None:
            known = call.selections[id(self)] = (self, self._resolve(call))
        return known[1]

    def _resolve(self, call: Call) -> Selection:
        chosen = self._chosen(call) & (call.positions >= self.skip_first)
        if not bool(chosen.any()):
            if not (self.may_miss or call.continues or self.tokens == "generated"):
                raise ConfigError(
                    f"tokens={self.tokens!r} with skip_first={self.skip_first} matches no token of this batch, whose "
                    f"rows have {int(call.lengths.min())} to {int(call.lengths.max())} real tokens"
                )
            return Selection(
                _shape(call),
                torch.zeros(0, dtype=torch.long, device="cpu"),
                None,
                *torch.zeros(2, 0, dtype=torch.long, device="cpu"),
            )
        if self.tokens == "mean":
            sample = chosen.any(1).nonzero()[:, 0].cpu()
            return Selection(_shape(call), None, chosen, sample, torch.full_like(sample, -1))
        sample, token = chosen.nonzero(as_tuple=True)
        index = None if bool(chosen.all()) else sample * chosen.shape[1] + token
        return Selection(_shape(call), index, None, sample.cpu(), call.positions[sample, token].cpu())

    def _chosen(self, call: Call) -> Tensor:
        position, tokens = call.positions, self.tokens
        real = position >= 0
        if callable(tokens) or isinstance(tokens, Tensor):
            return _user_mask(tokens, call) & real
        if tokens == "all":
            return real
        if tokens in ("prompt", "generated"):
            return real & (call.phase == tokens)
        length = call.lengths.to(position.device).unsqueeze(1)
        relative = tokens in ("last", "mean")
        if relative:
            # The end of a row is known once: steps of cached decoding lie beyond it.
            inside = real & (call.phase == "prompt")
            return inside & (position == length - 1) if tokens == "last" else inside
        parts = tokens if isinstance(tokens, tuple) else (tokens,)
        chosen = torch.zeros_like(real)
        for part in parts:
            chosen |= _in_part(part, position, length, call.phase == "prompt")
        return chosen & real


def _in_part(part: Any, position: Tensor, length: Tensor, is_prompt: bool) -> Tensor:
    if isinstance(part, int):
        if part < 0 and not is_prompt:
            return torch.zeros_like(position, dtype=torch.bool)
        return position == (part if part >= 0 else length + part)
    start, stop, step = part.start, part.stop, part.step or 1
    from_end = [edge for edge in (start, stop) if edge is not None and edge < 0]
    if from_end and not is_prompt:
        return torch.zeros_like(position, dtype=torch.bool)
    low = 0 if start is None else start
    low = (length + low).clamp(min=0) if low < 0 else torch.full_like(length, low)
    high = length if stop is None else (length + stop if stop < 0 else torch.full_like(length, stop))
    return (position >= low) & (position < high) & ((position - low) % step == 0)


def _user_mask(tokens: Any, call: Call) -> Tensor:
    mask = tokens(call) if callable(tokens) else tokens
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(f"a token mask is a bool tensor of shape (batch, tokens), got {got}")
    if tuple(mask.shape) != call.shape:
        if call.phase == "generated" and not callable(tokens):
            return torch.zeros_like(call.positions, dtype=torch.bool)
        raise ConfigError(f"the token mask has shape {tuple(mask.shape)}, the batch {call.shape}")
    return mask.to(call.positions.device)


def _shape(call: Call) -> tuple[int, int]:
    return (call.positions.shape[0], call.positions.shape[1])


def _is_span(part: slice) -> bool:
    edges = all(edge is None or _is_position(edge) for edge in (part.start, part.stop, part.step))
    return edges and (part.step is None or part.step > 0)


def _of_range(positions: range) -> slice | tuple[int, ...]:
    # -1 is the last token, so range(-3, 0) cannot become a slice, whose stop 0 means the first.
    if positions and positions.step > 0 and positions.start >= 0:
        return slice(positions.start, positions.stop, positions.step)
    return tuple(positions)


def _is_position(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_span(text: str) -> slice | int:
    found = _SPAN.fullmatch(text)
    if found:
        start, stop = (None if edge is None else int(edge) for edge in found.groups())
        return slice(start, stop)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(unknown("token selection", text, [*WORDS, "start:stop"])) from None


def tokens_text(tokens: Any) -> str:
    """Say in a table's ``meta`` which tokens counted, without addresses or the values of a mask.

    Example:
        >>> import torch
        >>> tokens_text(slice(1, None)), tokens_text(torch.ones(2, 3, dtype=torch.bool)), tokens_text((0, -1))
        ('1:', 'mask (2, 3)', '0, -1')
    """
    if isinstance(tokens, Tensor):
        return f"mask {tuple(tokens.shape)}"
    if isinstance(tokens, slice):
        edges = [tokens.start, tokens.stop] + ([tokens.step] if tokens.step else [])
        return ":".join("" if edge is None else str(edge) for edge in edges)
    if isinstance(tokens, (tuple, list)):
        return ", ".join(map(tokens_text, tokens))
    return getattr(tokens, "__name__", type(tokens).__name__) if callable(tokens) else str(tokens)
