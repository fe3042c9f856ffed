"""The calls of patching: a TensorDict with both inputs, two encodings, or a sweep."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

from tdprobe.errors import ConfigError, MissingKeyError, StateError
from tdprobe.latent.patching_sweep import sweep
from tdprobe.latent.path_sites import as_inputs, as_path, flattened, part_of
from tdprobe.modules import HookedModule, NamedModule


class PatchedModule(HookedModule):
    """A model that runs twice: on the clean input, and on the other one with activations of the clean run in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inputs, outputs = list(self.td_module.in_keys), list(self.td_module.out_keys)
        self._in_keys = inputs + [self._patch_key(key) for key in inputs]
        self._out_keys_apparent = outputs + [self._patch_key(key) for key in outputs]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run both inputs; see the factory for what goes in and comes out."""
        context = self.hooking_context
        context.require_active("call the hooked module")
        if context.mode != "off":
            return super().forward(*args, **kwargs)
        if len(args) == 1 and not kwargs and is_tensor_collection(args[0]):
            return self._both_and_forget(args[0])
        if not kwargs and len(args) == len(self.in_keys) and all(isinstance(arg, Tensor) for arg in args):
            td = TensorDict(batch_size=[])
            for key, value in zip(self.in_keys, args, strict=True):
                td.set(key, value)
            result = self._both_and_forget(td)
            return tuple(result.get(key) for key in self.out_keys)
        raise StateError(
            "patching needs a clean input and another one: call hooked(tensordict) with both, hooked.patch(clean, "
            f"other) with encodings, or hooked(...) with the {len(self.in_keys)} tensors "
            f"{', '.join(map(repr, self.in_keys))}"
        )

    def patch(self, clean: Any, other: Any) -> Any:
        """Run the model on ``other`` with activations of its run on ``clean``.

        Args:
            clean: A tokenizer's encoding or another mapping of keywords, a tensor, a TensorDict, or a tuple of
                positional arguments. Its pass ends after the last module that is patched.
            other: The recipient, the same way.

        Returns:
            What the model returns for ``other``: a ``ModelOutput`` for an encoding, a tensor for a tensor.
        """
        with self.patching(clean):
            return self(*as_inputs(other))

    @contextmanager
    def patching(self, clean: Any) -> Generator[HookedModule]:
        """Patch every forward pass in a block, of this module, of the model, or of ``generate()`` (its prompt only).

        Args:
            clean: See :meth:`patch`.
        """
        context = self.hooking_context
        context.require_active("patch")
        try:
            context.run_clean(lambda: HookedModule.forward(self, *as_inputs(clean)), whole=False)
            with context.patching():
                yield self
        finally:
            context.forget()

    def sweep(self, clean: Any, other: Any, metric: Callable[[Any], Tensor], *, rows_per_call: int = 64) -> Tensor:
        """Patch one module and one token at a time, and measure what comes out.

        There is one clean run, and the patched runs are rows of common batches.

        Args:
            clean: See :meth:`patch`.
            other: The recipient: a mapping of keywords or a tensor, batch first.
            metric: Takes the model's output for a batch and returns one number per row, such as a difference of two
                logits.
            rows_per_call: Rows of a batch.

        Returns:
            (modules, rows, positions) of what ``metric`` returns, NaN where the clause selects no token; positions are
            those among the real tokens of a row.

        Raises:
            ConfigError: The two inputs have different numbers of selected tokens, or ``metric`` returns another shape.

        Example:
            >>> from tdprobe.latent import ActivationPatching
            >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten())
            >>> with ActivationPatching(["[0]"]).prepare(model) as hooked:
            ...     hooked.sweep(torch.ones(1, 2, 1), torch.zeros(1, 2, 1), lambda out: out[:, 1]).tolist()
            [[[0.0, 1.0]]]
        """
        if not isinstance(rows_per_call, int) or rows_per_call < 1:
            raise ConfigError(f"rows_per_call counts rows (an int of at least 1), got {rows_per_call!r}")
        context = self.hooking_context
        context.require_active("patch")
        try:
            with torch.no_grad():
                context.run_clean(lambda: HookedModule.forward(self, *as_inputs(clean)), whole=False)
                return sweep(context, self, as_inputs(other), metric, rows_per_call)
        finally:
            context.forget()

    def _both_and_forget(self, td: TensorDictBase) -> TensorDictBase:
        try:
            return self._both(td)
        finally:
            self.hooking_context.forget()

    def _both(self, td: TensorDictBase) -> TensorDictBase:
        context, key = self.hooking_context, self.hooking_context.factory.patch_key
        other = part_of(td, key, "patching needs every input twice")
        clean = flattened(td.exclude(key), td.batch_size)
        self._require_the_same_inputs(clean, other)
        outputs = context.run_clean(lambda: self._run(clean, td.batch_size), whole=True)
        with context.patching():
            patched = self._run(other, td.batch_size)
        for name in patched.keys(include_nested=True, leaves_only=True):
            td.set(name, outputs.get(name))
            td.set(self._patch_key(name), patched.get(name))
        result = td.copy()
        if not context.factory.clean_intermediate_keys:
            for path, value in context.restored.items():
                shape = (*td.batch_size, *value.shape[1:]) if td.batch_dims > 1 else value.shape
                result.set(("_cache", path), value.reshape(shape))
        return result

    def _run(self, inputs: TensorDictBase, batch_size: torch.Size) -> TensorDictBase:
        # A copy, because a clean run may have to be repeated on inputs that have no outputs in them.
        outputs = HookedModule.forward(self, inputs.copy())
        outputs = outputs.select(*self.td_module.out_keys, strict=False)
        return outputs.reshape(batch_size) if len(batch_size) > 1 else outputs

    def _patch_key(self, key: Any) -> tuple[str, ...]:
        return (*as_path(self.hooking_context.factory.patch_key), *as_path(key))

    def _require_the_same_inputs(self, clean: TensorDictBase, other: TensorDictBase) -> None:
        module = self.td_module
        if not isinstance(module, NamedModule) or not module.defaulted or "input" in clean.keys():
            return
        # Keys are bound by forward's names: one that is left out would take its default in silence.
        missing = [key for key in clean.keys() if key in module.signature.documented and key not in other.keys()]
        if missing:
            names = ", ".join(repr(self._patch_key(key)) for key in missing)
            raise MissingKeyError(f"patching needs every input twice, and the TensorDict lacks {names}")
