"""What is known about one forward pass: its tokens, its padding, its phase."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tdprobe._types import named_forward
from tdprobe.errors import ConfigError

Phase = Literal["prompt", "generated"]

# transformers 5.24 has renamed the second to the first.
CACHES = ("cache", "past_key_values")


@dataclass(eq=False)
class Call:
    """One forward pass of the model.

    Attributes:
        shape: (batch, tokens) of this pass, or ``None`` where the input has no token axis.
        mask: (batch, seen) bool, true at real tokens, over everything the pass can attend to; ``None``: all real.
        input_ids: (batch, tokens) integers, where the model takes them.
        phase: ``"generated"`` for the steps of cached decoding, else ``"prompt"``.
        pad_token_id: The model's own, if it names one.
        continues: Whether the pass keeps a cache, so that tokens of other passes belong to the same texts.
        two_sided: Whether an encoder and a decoder see different tokens in this pass.
    """

    shape: tuple[int, int] | None
    mask: Tensor | None = None
    input_ids: Tensor | None = None
    phase: Phase = "prompt"
    pad_token_id: int | None = None
    continues: bool = False
    two_sided: bool = False
    selections: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def valid(self) -> Tensor:
        """(batch, seen) bool; refuses a batch that looks padded but has no mask."""
        if self.shape is None:
            raise ConfigError("the input of this model has no token axis, so there is no token to select")
        if self.two_sided:
            raise ConfigError(
                "the encoder and the decoder of this model see different tokens, so one choice cannot hold for both; "
                "prepare one of them, model.get_encoder() or model.get_decoder(), and call the model as before"
            )
        if self.mask is None:
            self._refuse_padding()
            return torch.ones(self.shape, dtype=torch.bool, device="cpu")
        if not isinstance(self.mask, Tensor) or self.mask.ndim != 2:
            got = tuple(self.mask.shape) if isinstance(self.mask, Tensor) else f"a {type(self.mask).__name__}"
            raise ConfigError(
                f"tokens are selected by an attention mask of shape (batch, tokens), got {got}, which does not say "
                "which tokens are padding; pass the tokenizer's attention_mask, and leave generate() its default cache"
            )
        batch, tokens = self.shape
        if len(self.mask) not in (1, batch) or self.mask.shape[1] < tokens:
            raise ConfigError(
                f"the attention mask has shape {tuple(self.mask.shape)} for a batch of {batch} x {tokens} tokens; it "
                "has one row for each text and one column for each token, and for those in the cache before them"
            )
        # One row may stand for all texts.
        return self.mask.bool().expand(batch, -1)

    @cached_property
    def positions(self) -> Tensor:
        """(batch, tokens) position among the row's real tokens, counted from its first, -1 at pads."""
        tokens = self.shape[1] if self.shape else 0
        counted = self.valid.long().cumsum(1) - 1
        return torch.where(self.valid, counted, -1)[:, -tokens:]

    @cached_property
    def lengths(self) -> Tensor:
        """(batch,) number of real tokens up to the end of this pass."""
        return self.valid.sum(1)

    def _refuse_padding(self) -> None:
        ids, pad = self.input_ids, self.pad_token_id
        if ids is None or pad is None or ids.shape[0] < 2 or self.phase == "generated":
            return
        is_pad = ids == pad
        for side in (is_pad.flip(1), is_pad):
            runs = side.long().cumprod(1).sum(1)
            if not bool((runs == runs[0]).all()):
                row = int(runs.argmax())
                raise ConfigError(
                    f"row {row} of the batch begins or ends with {int(runs[row])} pad tokens (id {pad}) that other "
                    "rows lack, and there is no attention mask to tell them from text; pass attention_mask, as the "
                    "tokenizer returns it"
                )


class CallReader:
    """Read a :class:`Call` off the arguments of a model's forward.

    Args:
        model: The model whose forward is called.
    """

    def __init__(self, model: nn.Module) -> None:
        model = named_forward(model)
        parameters = list(inspect.signature(model.forward).parameters.values())
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [p.name for p in parameters if p.kind in plain]
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._pad = pad if isinstance(pad, int) else None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return what the arguments say about tokens."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids = given.get("input_ids")
        lead = next((v for v in (ids, given.get("inputs_embeds"), *given.values()) if isinstance(v, Tensor)), None)
        if ids is None and lead is not None and lead.ndim == 2 and not lead.is_floating_point():
            ids = lead
        known = ids is not None or "inputs_embeds" in given or (lead is not None and lead.ndim == 3)
        if not known or lead is None or lead.ndim < 2:
            return Call(None)
        mask = given.get("attention_mask")
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        past = _past_length(cache, mask, lead.shape[1])
        if mask is None and past:
            mask = torch.ones(lead.shape[0], past + lead.shape[1], dtype=torch.bool, device="cpu")
        else:
            mask = _padding(mask, past, lead.shape[1])
        return Call(
            (lead.shape[0], lead.shape[1]),
            mask,
            ids,
            "generated" if past else "prompt",
            self._pad,
            continues=past > 0 or hasattr(cache, "get_seq_length"),
            two_sided="decoder_input_ids" in self._names and _sides_differ(given),
        )


def _sides_differ(given: Mapping[str, Any]) -> bool:
    shapes = [
        next((given[name].shape[:2] for name in names if isinstance(given.get(name), Tensor)), None)
        for names in (("input_ids", "inputs_embeds"), ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
    ]
    # Labels of whole texts are no tokens.
    return shapes[1] is not None and len(shapes[1]) == 2 and shapes[0] != shapes[1]


def _past_length(cache: Any, mask: Tensor | None, tokens: int) -> int:
    length: Callable[[], Any] | None = getattr(cache, "get_seq_length", None)
    if length is not None:
        return int(length())
    return max(0, mask.shape[-1] - tokens) if isinstance(mask, Tensor) and mask.ndim == 2 else 0


def _padding(mask: Any, past: int, tokens: int) -> Any:
    """Read which tokens are real off the causal mask that ``generate()`` makes for a cache of fixed size.

    Args:
        mask: As the model gets it: (batch, tokens), or by pairs of tokens, (batch, heads, tokens, places), perhaps one
            for each kind of layer.
        past: Tokens in the cache.
        tokens: Tokens of this pass.

    Returns:
        (batch, past + tokens) bool for a mask by pairs that is causal attention among real tokens; else ``mask``.
    """
    pairs = mask
    if isinstance(mask, Mapping):
        pairs = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(pairs, Tensor) or pairs.ndim != 4 or pairs.shape[-2] != tokens or pairs.shape[-1] < past + tokens:
        return mask
    # Additive masks hold 0 where attention is allowed.
    sees = (pairs == 0 if pairs.is_floating_point() else pairs.bool())[:, 0, :, : past + tokens]
    real = sees.any(1)
    causal = torch.ones(tokens, past + tokens, dtype=torch.bool, device=sees.device).tril(past) & real.unsqueeze(1)
    # What pads attend to means nothing.
    told = ((sees == causal) | ~real[:, past:].unsqueeze(2)).all() & real.any(1).all()
    return real if bool(told) else mask
