"""Patch one module and one token at a time, many of them in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tdprobe.errors import ConfigError, StateError
from tdprobe.latent.patching_runs import Pair, PatchingContext, check_pair
from tdprobe.stream.call import CallReader
from tdprobe.stream.tokens import Selection, TokenClause

if TYPE_CHECKING:
    from tdprobe.latent.patched_module import PatchedModule


def sweep(
    context: PatchingContext,
    hooked: PatchedModule,
    inputs: tuple[Any, ...],
    metric: Callable[[Any], Tensor],
    rows_per_call: int,
) -> Tensor:
    """Run every single patch; see :meth:`tdprobe.latent.patched_module.PatchedModule.sweep`."""
    pair = _tokens(context, inputs)
    mine = pair[1]
    sites = [site for site in context.sites if site.name in context.clean]
    jobs = [(place, token) for place in range(len(sites)) for token in range(mine.n)]
    found = torch.full((len(sites), mine.shape[0], int(mine.position.max()) + 1), torch.nan, device="cpu")
    for start in range(0, len(jobs), rows_per_call):
        chunk = jobs[start : start + rows_per_call]
        places, tokens = (torch.tensor(column, device="cpu") for column in zip(*chunk, strict=True))
        here = places.unique().tolist()
        context.pairs = {sites[place].name: _pair(pair, tokens, places == place) for place in here}
        try:
            with context.patching():
                output = hooked(*(_rows_of(given, mine.sample[tokens], mine.shape[0]) for given in inputs))
        finally:
            context.pairs = None
        found[places, mine.sample[tokens], mine.position[tokens]] = _numbers(metric(output), len(chunk))
    return found


def _tokens(context: PatchingContext, inputs: tuple[Any, ...]) -> Pair:
    """Select the tokens of the clean input and those of the recipient that they go to."""
    clause = context.clause or TokenClause("all")
    by_name = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Mapping) else None
    call = CallReader(context.model).read(inputs if by_name is None else (), dict(by_name or {}))
    stored = next((values[0] for values in context.clean.values()), None)
    if stored is None or stored.call is None:
        raise StateError("none of the modules ran in the clean run, so there is nothing to patch")
    pair = clause.select(stored.call), clause.select(call)
    check_pair(pair)
    return pair


def _rows_of(given: Any, samples: Tensor, n: int) -> Any:
    if isinstance(given, Mapping):
        return {name: _rows_of(value, samples, n) for name, value in given.items()}
    has_rows = isinstance(given, Tensor) and given.ndim and given.shape[0] == n
    return given[samples.to(given.device)] if has_rows else given


def _pair(pair: Pair, tokens: Tensor, here: Tensor) -> Pair:
    """Narrow a pairing to one token per row of a batch, and to the rows of one module."""
    theirs, mine = pair
    rows, tokens = here.nonzero()[:, 0], tokens[here]
    n_tokens = mine.shape[1]
    index = rows * n_tokens + _places(mine)[tokens] % n_tokens
    return (
        Selection(theirs.shape, _places(theirs)[tokens], None, rows, theirs.position[tokens]),
        Selection((len(here), n_tokens), index, None, rows, mine.position[tokens]),
    )


def _places(selection: Selection) -> Tensor:
    return torch.arange(selection.n, device="cpu") if selection.index is None else selection.index.cpu()


def _numbers(values: Any, n: int) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (n,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(f"the metric returns one number per row, a tensor of shape ({n},) here; got {shape}")
    return values.detach().float().cpu()
