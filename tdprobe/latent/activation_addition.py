"""Compute steering vectors: the difference that a contrast makes at some modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict, is_tensor_collection
from torch import Tensor, nn

from tdprobe.contexts import Site
from tdprobe.errors import ConfigError, StateError
from tdprobe.hooks import Hook, check_callback, keep
from tdprobe.hooks.gate import in_backward
from tdprobe.latent.path_sites import Key, PathContext, PathFactory, as_inputs, as_path, part_of, tensor_at
from tdprobe.modules import HookedModule
from tdprobe.stream.rows import token_rows

ANY = -1
METHODS = ("mean_difference", "pca")


class AdditionContext(PathContext):
    """Collect what the modules give in the positive and in the negative run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values: dict[str, Tensor] | None = None

    def contrast(self, positive: Any, negative: Any) -> TensorDict:
        """Compute the vectors in a block of its own; see :meth:`AdditionModule.contrast`."""
        with self as hooked:
            return hooked.contrast(positive, negative)


class AdditionModule(HookedModule):
    """A model that takes both sides of a contrast and gives the difference."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        factory = self.hooking_context.factory
        sides = (factory.positive_key, factory.negative_key)
        self._in_keys = [(*as_path(side), *as_path(key)) for side in sides for key in self.td_module.in_keys]
        self._out_keys_apparent = [(*as_path(factory.steer_key), path) for path in factory.paths]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run both sides of a TensorDict and return the vectors."""
        self.hooking_context.require_active("call the hooked module")
        if len(args) != 1 or kwargs or not is_tensor_collection(args[0]):
            raise StateError(
                "ActivationAddition compares two inputs: call hooked(tensordict) with both of them, or "
                "hooked.contrast(positive, negative) with encodings or tensors"
            )
        td, factory = args[0], self.hooking_context.factory
        keys = (factory.positive_key, factory.negative_key)
        sides = [part_of(td, key, "ActivationAddition needs every input twice") for key in keys]
        samples = td.batch_size.numel() if td.batch_dims else None
        return self._difference([(side,) for side in sides], samples, td.device)

    def contrast(self, positive: Any, negative: Any) -> TensorDict:
        """Compute the vectors from two inputs as the model itself takes them.

        Args:
            positive: A tokenizer's encoding, a tensor, a TensorDict, or a tuple of positional arguments.
            negative: The same for the other side.

        Returns:
            What a call with a TensorDict returns, averaged over the batch.
        """
        self.hooking_context.require_active("call the hooked module")
        return self._difference([as_inputs(positive), as_inputs(negative)], ANY, None)

    def _difference(self, sides: list[tuple[Any, ...]], samples: int | None, device: Any) -> TensorDict:
        positive, negative = (self._collect(side) for side in sides)
        factory: ActivationAddition = self.hooking_context.factory
        result = TensorDict({}, batch_size=[], device=device)
        for site in self.hooking_context.sites:
            if site.name not in positive or site.name not in negative:
                raise StateError(f"{site.name!r} did not run on both sides, so there is no difference")
            # What is kept is ordinary, and so are the vectors, which may be trained further.
            with torch.inference_mode(False):
                vector = factory.vector(site.name, positive[site.name], negative[site.name], samples)
            result.set((*as_path(factory.steer_key), site.name), vector)
        return result

    def _collect(self, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        context: AdditionContext = self.hooking_context
        context.values = values = {}
        try:
            super().forward(*inputs)
        finally:
            context.values = None
        return values


class ActivationAddition(PathFactory):
    r"""Compute the vectors :math:`v = \operatorname{mean}(h^+ - h^-)` that :class:`SteeringVectors` adds.

    A call takes a TensorDict with every input twice, under ``positive_key`` and ``negative_key``, and returns a new
    TensorDict of batch size ``[]`` with ``(steer_key, path)`` only; the one that was given stays as it is. The mean is
    over the batch dimensions: with none, the difference itself is returned. ``hooked.contrast(positive, negative)``
    takes encodings, and so does ``factory.prepare(model).contrast(positive, negative)``, which needs no block.

    Args:
        modules_to_steer: Module paths, such as ``"model.layers[10]"``.
        positive_key: Where the inputs are that have the property.
        negative_key: Where those are that lack it.
        steer_key: Where the vectors go.
        clean_intermediate_keys: Kept for programs that give it; intermediate values are never in the result.
        cache_callback: Called by keyword with ``module``, ``args``, ``output``, ``key`` and ``direction``; returns the
            value whose difference is taken.
        tokens: Take the difference of these tokens' rows, averaged over all of them: (width,) vectors. ``"last"`` and
            ``"mean"`` give one row per sample; see :class:`tdprobe.stream.tokens.TokenClause`.
        skip_first: Leave out the first real tokens of each row.
        method: ``"mean_difference"``, or ``"pca"``: the mean difference projected onto the first principal direction of
            the pairs' differences, which are not centred (centring would remove the very direction that is wanted).
        early_stop: End both passes once every module has run; of a module that runs several times in a pass, the first
            run counts instead of the last.
        required: A path that leads nowhere, or a module that never runs, are errors.

    Raises:
        ConfigError: An argument is not allowed; on enter also for a path that leads nowhere.

    Example:
        >>> from tensordict import TensorDict
        >>> sides = {"positive": {"input": torch.ones(5, 4)}, "negative": {"input": torch.zeros(5, 4)}}
        >>> with ActivationAddition(["[0]"]).prepare(nn.Sequential(nn.Linear(4, 3))) as hooked:
        ...     vectors = hooked(TensorDict(sides, batch_size=[5]))
        >>> vectors["steer", "[0]"].shape
        torch.Size([3])

    References:
        Turner et al., Steering Language Models With Activation Engineering, 2023, https://arxiv.org/abs/2308.10248.
        Zou et al., Representation Engineering, 2023, https://arxiv.org/abs/2310.01405 (pca).
    """

    _hooking_context_class = AdditionContext
    _hooked_module_class = AdditionModule

    def __init__(
        self,
        modules_to_steer: Sequence[str],
        positive_key: Key = "positive",
        negative_key: Key = "negative",
        steer_key: Key = "steer",
        clean_intermediate_keys: bool = True,
        cache_callback: Callable[..., Any] | None = None,
        *,
        tokens: Any = None,
        skip_first: int = 0,
        method: Literal["mean_difference", "pca"] = "mean_difference",
        early_stop: bool = False,
        required: bool = True,
    ) -> None:
        super().__init__(modules_to_steer, tokens=tokens, skip_first=skip_first, required=required)
        if method not in METHODS:
            raise ConfigError(f"method is one of {', '.join(map(repr, METHODS))}, got {method!r}")
        self.positive_key = positive_key
        self.negative_key = negative_key
        self.steer_key = steer_key
        self.cache_callback = cache_callback
        self.method = method
        self.early_stop = early_stop

    def _site_hook(self, context: AdditionContext, module: nn.Module, site: Site) -> Hook:
        callback = self.cache_callback
        if callback is not None:
            check_callback(callback, "fwd", ("key", "direction"))

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if context.values is None or not context.gate.admits() or in_backward():
                return
            if callback is not None:
                output = callback(module=module, args=args, output=output, key=site.name, direction="fwd")
            value = tensor_at(output, site)
            if self.clause is not None:
                value = token_rows(site.name, value, context.selection())
            context.values[site.name] = keep(value)
            context.fired(site)

        return Hook(module, "fwd", hook)

    def vector(self, path: str, positive: Tensor, negative: Tensor, samples: int | None = ANY) -> Tensor:
        """Compute one vector.

        Args:
            path: The module, for messages.
            positive: Values of the positive run, or (n, width) rows of its selected tokens.
            negative: The same for the negative run.
            samples: Length of the first axis, over which the mean is taken; -1: any; ``None``: it is no axis of
                samples, and nothing is averaged. Rows of tokens always are.
        """
        wide = torch.promote_types(torch.promote_types(positive.dtype, negative.dtype), torch.float32)
        if self.clause is not None and self.method == "mean_difference":
            # Rows need not come in pairs, so the means are taken first.
            return (positive.to(wide).mean(0) - negative.to(wide).mean(0)).to(positive.dtype)
        if positive.shape != negative.shape:
            what = "values" if self.clause is None else f"rows of tokens={self.clause.tokens!r}"
            raise ConfigError(
                f"the {what} at {path!r} have shape {tuple(positive.shape)} on the positive and "
                f"{tuple(negative.shape)} on the negative side, so there are no pairs; tokens='last' or 'mean' takes "
                "one row per sample"
            )
        difference = positive.to(wide) - negative.to(wide)
        if self.clause is None and samples is None and self.method == "mean_difference":
            return difference.to(positive.dtype)
        _check_samples(path, difference, samples if self.clause is None else ANY)
        mean = _first_direction(difference, path) if self.method == "pca" else difference.mean(0)
        return mean.to(positive.dtype)


def _check_samples(path: str, difference: Tensor, samples: int | None) -> None:
    if samples is None or difference.ndim == 0 or (samples != ANY and difference.shape[0] != samples):
        raise ConfigError(
            f"the values at {path!r} have shape {tuple(difference.shape)}, whose first axis is not that of the "
            f"{'(no)' if samples is None else samples} samples; a cache_callback can put it first"
        )


def _first_direction(difference: Tensor, path: str) -> Tensor:
    rows = difference.reshape(difference.shape[0], -1)
    if not bool(rows.isfinite().all()):
        raise StateError(f"the differences at {path!r} are not all finite, so they have no principal direction")
    direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    return ((rows.mean(0) @ direction) * direction).reshape(difference.shape[1:])
