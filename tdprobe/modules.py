"""The module that a context yields."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictModuleWrapper, dispatch
from torch import Tensor, nn

from tdprobe._types import UnraveledKey, named_forward
from tdprobe.errors import ConfigError, MissingKeyError, StateError
from tdprobe.hooks import EarlyStop, first_tensor
from tdprobe.hooks.access import ModuleAccess
from tdprobe.hooks.signature import Signature

if TYPE_CHECKING:
    from tdprobe.contexts import HookingContext


def user_model(module: nn.Module) -> nn.Module:
    """Return the model whose names the user knows: inside our wrapper, and inside ``torch.compile``'s."""
    model: Any = module
    while isinstance(model, (NamedModule, HookedModule)):
        model = model.module if isinstance(model, NamedModule) else model.td_module
    return getattr(model, "_orig_mod", model)


def require_module(module: Any) -> None:
    """Refuse what is no module, such as the name of a model, or a model with its tokenizer.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(module, nn.Module):
        return
    inner = next((name for name in ("model", "module") if isinstance(getattr(module, name, None), nn.Module)), None)
    hint = f"prepare its .{inner}" if inner else "tdprobe.hf.load(name).model is one, of a checkpoint"
    # A repr would print the whole model.
    got = repr(module) if isinstance(module, str) else f"a {type(module).__name__}"
    raise ConfigError(f"prepare() takes a torch.nn.Module, got {got}; {hint}")


def is_hugging_face(module: nn.Module) -> bool:
    """Tell a transformers model without importing transformers."""
    return isinstance(getattr(named_forward(user_model(module)), "main_input_name", None), str)


def input_device(model: nn.Module) -> torch.device | None:
    """Return where inputs go: to the first parameters, of those that are not kept elsewhere until they are used."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)


class NamedModule(TensorDictModule):
    """A plain module that reads and writes a TensorDict.

    Args:
        module: The user's model; it is called as it is, never replaced.
        in_keys: A list goes in by position, a dict maps forward's names to TensorDict keys. ``None`` means
            ``["input"]``, or, where the TensorDict has no such key, every key by forward's own names.
        out_keys: Where outputs go; ``None`` means ``["output"]``. A key that names a field of a ``ModelOutput``
            takes that field; otherwise the first key takes the first tensor.

    Attributes:
        withheld: Keys that a context reads for itself; they are not given to the model unless ``in_keys`` names them.
    """

    withheld: frozenset[str] = frozenset()

    def __init__(
        self,
        module: nn.Module,
        in_keys: Sequence[UnraveledKey] | Mapping[str, UnraveledKey] | None = None,
        out_keys: Sequence[UnraveledKey] | None = None,
    ) -> None:
        keys: Any = dict(in_keys) if isinstance(in_keys, Mapping) else list(in_keys or ["input"])
        if isinstance(keys, list) and in_keys is not None and is_hugging_face(module):
            # By position, a second key would land in whatever forward happens to take second (GPT-2: the cache).
            named = Signature(named_forward(user_model(module))).named
            if all(key in named for key in keys):
                keys = {key: key for key in keys}
        outputs: Any = list(out_keys or ["output"])
        super().__init__(module, keys, outputs)
        self.__dict__["defaulted"] = in_keys is None

    @cached_property
    def signature(self) -> Signature:
        """The names that the user's model takes."""
        return Signature(named_forward(user_model(self)))

    @cached_property
    def is_hugging_face(self) -> bool:
        """Whether the user's model is one of transformers."""
        return is_hugging_face(self)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Read the inputs from ``tensordict`` and write the outputs to it."""
        args, kwargs = self._arguments(tensordict)
        output = self.module(*args, **kwargs)
        for key, value in self._outputs(output).items():
            tensordict.set(key, value)
        return tensordict

    def _arguments(self, td: TensorDictBase) -> tuple[list[Any], dict[str, Any]]:
        if self.defaulted and "input" not in td.keys():
            given = [key for key in td.keys() if key not in self.out_keys and key not in self.withheld]
            names = [key for key in given if key in self.signature.documented]
            if not names:
                self.signature.check(given or ["input"])
            self.signature.warn_of_near(given)
            return [], {name: td.get(name) for name in names}
        missing = [key for key in self.in_keys if td.get(key, None) is None]
        if missing:
            present = ", ".join(map(repr, td.keys(include_nested=True, leaves_only=True)))
            raise MissingKeyError(f"the TensorDict lacks {', '.join(map(repr, missing))}; it has {present or 'no key'}")
        values = [td.get(key) for key in self.in_keys]
        return ([], dict(zip(self._kwargs, values, strict=True))) if self._kwargs is not None else (values, {})

    def _outputs(self, output: Any) -> dict[Any, Any]:
        keys = [key for key in self.out_keys if key != "_"]
        if isinstance(output, Mapping) and not isinstance(output, TensorDictBase):
            if all(key in output for key in keys):
                return {key: output[key] for key in keys}
        elif isinstance(output, (tuple, list)) and len(self.out_keys) > 1:
            if len(output) != len(self.out_keys):
                raise ConfigError(
                    f"{type(user_model(self)).__name__} gave {len(output)} outputs for the "
                    f"{len(self.out_keys)} out_keys {self.out_keys}"
                )
            return {k: v for k, v in zip(self.out_keys, output, strict=True) if k != "_"}
        if len(keys) != 1:
            fields = f" with the fields {', '.join(output)}" if isinstance(output, Mapping) else ""
            raise ConfigError(f"the out_keys {keys} do not fit an output of type {type(output).__name__}{fields}")
        value = first_tensor(output)
        return {keys[0]: TensorDict.from_any(output) if value is None else value}


class HookedModule(ModuleAccess, TensorDictModuleWrapper):
    """A model inside its context: call it, and what the context is for happens.

    A TensorDict in gives the same TensorDict back, with the outputs in it. Tensors in give tensors out.
    Keywords, or a tokenizer's encoding, give what the model itself returns. Other attributes are the model's own.

    Args:
        td_module: What is called.
        hooking_context: The context that made it.
        relative_path: Where the user's model is, seen from here.
    """

    def __init__(
        self,
        td_module: TensorDictModuleBase,
        hooking_context: HookingContext,
        relative_path: str = "td_module",
    ) -> None:
        super().__init__(td_module)
        self.__dict__["hooking_context"] = hooking_context
        self.__dict__["relative_path"] = relative_path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model inside its context; see the class for what goes in and comes out."""
        context = self.hooking_context
        context.require_active("call the hooked module")
        td = args[0] if len(args) == 1 and not kwargs and is_tensor_collection(args[0]) else None
        try:
            with context.calling():
                return self._call(td, args, kwargs)
        except EarlyStop:
            context.stopped_early()
            return td

    def _call(self, td: TensorDictBase | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.td_module
        if td is not None:
            return module(td)
        if not isinstance(module, NamedModule):
            return module(*args, **kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            if not module.is_hugging_face and not module.signature.documented.intersection(args[0]):
                # A model whose forward takes one mapping.
                return module.module(args[0])
            args, kwargs = (), dict(args[0])
        elif len(args) > len(module.in_keys):
            return module.module(*args, **kwargs)
        elif not kwargs and not module.is_hugging_face:
            return module(*args)
        elif not module.is_hugging_face and set(kwargs) <= {_flat(key) for key in module.in_keys}:
            return module(*args, **kwargs)
        module.signature.check([name for name, value in kwargs.items() if isinstance(value, Tensor)])
        return module.module(*args, **kwargs)

    def restore(self) -> None:
        """Leave a context that was entered by ``prepare(..., return_context=False)``.

        Raises:
            StateError: The context is not active, or a ``with`` block manages it.
        """
        self.hooking_context.restore()

    @contextmanager
    def disable_context_hooks(self) -> Generator[None]:
        """Lift the context's hooks for a while."""
        with self.hooking_context.disable_hooks():
            yield

    @contextmanager
    def disable_context(self) -> Generator[nn.Module]:
        """Lift the context's hooks and yield the TensorDict module without them."""
        with self.hooking_context.disable_hooks():
            yield self.td_module


def _flat(key: Any) -> str:
    # Keywords cannot be nested: tensordict's dispatch joins the parts of a key.
    return "_".join(key) if isinstance(key, tuple) else key


def require_keys(kind: str, given: Sequence[Any], own: Sequence[Any]) -> None:
    """Validate keys against those that a TensorDict module has.

    Raises:
        ConfigError: A key is no str or flat tuple of str, or the module lacks it.
    """
    for key in given:
        if not isinstance(key, UnraveledKey):
            raise ConfigError(f"{kind} must be strings or flat tuples of strings, got {key!r}")
        if key not in own:
            raise ConfigError(f"the key {key!r} is not among the {kind} of the module: {', '.join(map(repr, own))}")


__all__ = [
    "HookedModule",
    "NamedModule",
    "Signature",
    "StateError",
    "is_hugging_face",
    "require_keys",
    "user_model",
]
