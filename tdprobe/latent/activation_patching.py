"""Patch activations of one run of a model into another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tdprobe.contexts import Site
from tdprobe.errors import ConfigError, StateError
from tdprobe.hooks import Hook, check_callback, keep, lazy_copy, replace_first_tensor
from tdprobe.hooks.gate import in_backward
from tdprobe.latent.patched_module import PatchedModule
from tdprobe.latent.patching_runs import PatchingContext, Stored, paired_rows, refuse_other_padding
from tdprobe.latent.path_sites import Key, PathFactory, tensor_at
from tdprobe.stream.edits import write_rows
from tdprobe.stream.tokens import Selection


class ActivationPatching(PathFactory):
    r"""Run a model on a clean and on another input, with activations of the clean run patched into the other.

    A call takes a TensorDict with every input twice, ``k`` (clean) and ``(patch_key, k)`` (the recipient). It runs the
    clean inputs, then the recipient's with the output of each named module replaced, :math:`h_\text{recipient}
    \leftarrow h_\text{clean}`, and returns a new TensorDict with the clean outputs and ``(patch_key, out_key)``; the
    caller's gets the outputs only. Occurrence is paired with occurrence where a module runs several times, and the
    clean run is left alone. Of a tuple or ``ModelOutput`` the first tensor is patched.

    With a tokenizer's encodings, ``hooked.patch(clean, corrupted)`` returns what the model returns for the second with
    the activations of the first, ``with hooked.patching(clean):`` patches every call in a block, also ``generate()``
    (its prompt), and ``hooked.sweep(clean, corrupted, metric)`` patches one module and one token at a time. There the
    clean run ends after the last module that is needed. Calls of the model itself outside of these are not patched.

    Args:
        modules_to_patch: Module paths, such as ``"model.layers[10]"`` or ``"model.layers[:]"``.
        patch_key: Where the recipient's inputs are, and where its outputs go.
        clean_intermediate_keys: ``False`` adds what was stored to the result, as ``("_cache", path)``.
        patch_fn: Called as ``patch_fn(module_key=path, output=recipient's, output_to_patch=stored)``; returns the value
            to go on with, ``None`` for the stored one. With ``tokens``, both are the (n, width) rows of the selected
            tokens.
        cache_callback: Called by keyword with ``module``, ``args``, ``output``, ``key`` and ``direction``; returns the
            value to store. It is called again on what the second run goes on with, which is what ``_cache`` shows in
            the end.
        tokens: Patch only these tokens: the k-th selected token of a row of the clean input goes where the k-th
            selected one of the recipient's row is, whatever the padding; see
            :class:`tdprobe.stream.tokens.TokenClause`.
        skip_first: Leave out the first real tokens of each row.
        required: A path that leads nowhere, or a module that is never patched, are errors.

    Raises:
        ConfigError: An argument is not allowed; on enter also for a path that leads nowhere; in a call for shapes,
            numbers of tokens or paddings that do not fit.
        MissingKeyError: The TensorDict lacks the recipient's inputs.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> td = TensorDict({"input": torch.ones(5, 4), "patched": {"input": torch.zeros(5, 4)}}, batch_size=[5])
        >>> with ActivationPatching(["[0]"]).prepare(model) as hooked:
        ...     result = hooked(td)
        >>> torch.equal(result["patched", "output"], result["output"])
        True

    References:
        Vig et al., Investigating Gender Bias in Language Models Using Causal Mediation Analysis, 2020.
        Meng et al., Locating and Editing Factual Associations in GPT, 2022, https://arxiv.org/abs/2202.05262.
        Zhang and Nanda, Towards Best Practices of Activation Patching, 2023, https://arxiv.org/abs/2309.16042.
    """

    _hooking_context_class = PatchingContext
    _hooked_module_class = PatchedModule

    def __init__(
        self,
        modules_to_patch: Sequence[str],
        patch_key: Key = "patched",
        clean_intermediate_keys: bool = True,
        patch_fn: Callable[..., Any] | None = None,
        cache_callback: Callable[..., Any] | None = None,
        *,
        tokens: Any = None,
        skip_first: int = 0,
        required: bool = True,
    ) -> None:
        super().__init__(modules_to_patch, tokens=tokens, skip_first=skip_first, required=required)
        if isinstance(tokens, str) and tokens in ("mean", "generated"):
            raise ConfigError(f"tokens={tokens!r} is no place to patch; 'all' patches every real token of the prompt")
        self.patch_key = patch_key
        self.clean_intermediate_keys = clean_intermediate_keys
        self.patch_fn = patch_fn
        self.cache_callback = cache_callback

    def _needs_calls(self) -> bool:
        return True

    def _site_hook(self, context: PatchingContext, module: nn.Module, site: Site) -> Hook:
        if self.cache_callback is not None:
            check_callback(self.cache_callback, "fwd", ("key", "direction"))

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not context.acts:
                return None
            if in_backward():
                again = context.repeated(site, tensor_at(output, site))
                return (
                    None if again is None else replace_first_tensor(output, self._patched(context, site, output, again))
                )
            if context.mode == "clean":
                context.store(site, self._kept(site, module, args, output))
                return None
            stored = context.next_stored(site)
            if stored is None:
                return None
            context.remember(site, tensor_at(output, site), stored)
            new = replace_first_tensor(output, self._patched(context, site, output, stored))
            context.restored[site.name] = self._kept(site, module, args, new)
            context.fired(site)
            return new

        return Hook(module, "fwd", hook, edits=True, order=context.gate.number)

    def _kept(self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        if self.cache_callback is not None:
            output = self.cache_callback(module=module, args=args, output=output, key=site.name, direction="fwd")
        return keep(tensor_at(output, site))

    def _patched(self, context: PatchingContext, site: Site, output: Any, stored: Stored) -> Tensor:
        """Return the recipient's value with the stored one in it."""
        value = tensor_at(output, site)
        pair = context.pair_at(site, stored)
        if pair is None:
            refuse_other_padding(site, stored.call, context.tracker.call)
            return self._chosen(site, value, stored.value)
        return self._patched_rows(site, value, stored, pair)

    def _patched_rows(self, site: Site, value: Tensor, stored: Stored, pair: tuple[Selection, Selection]) -> Tensor:
        if not pair[1].n:
            return value
        rows, theirs = paired_rows(site, value, stored, pair)
        return write_rows(site.name, value, pair[1], self._chosen(site, rows, theirs))

    def _chosen(self, site: Site, value: Tensor, stored: Tensor) -> Tensor:
        # A copy on write: neither patch_fn nor the model may change what is stored.
        offered = lazy_copy(stored)
        if self.patch_fn is None:
            return offered.to(value)
        new = self.patch_fn(module_key=site.name, output=value, output_to_patch=offered)
        if new is not None and not isinstance(new, Tensor):
            raise StateError(
                f"patch_fn returned a {type(new).__name__} for {site.name!r}, whose value is a "
                f"{type(value).__name__}; return a tensor of its shape, or None to go on with the stored one"
            )
        return (lazy_copy(stored) if new is None else new).to(value)
