"""A function of tensors as a TensorDict module that writes its value and the parts of it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdprobe._types import UnraveledKey
from tdprobe.errors import ConfigError, MissingKeyError, closest


class InformationModule(TensorDictModuleBase, ABC):
    """Read the arguments of a function from a tensordict, and write its value and the parts of it there.

    Args:
        in_keys: Where the arguments are, in the order of `roles`.
        names: What is written, the value first.
        prefix: Key below which that is; ``None``: the top.
    """

    roles: ClassVar[tuple[str, ...]]
    # Whether arguments have exactly (batch, tokens, features), and do not broadcast.
    _sized: ClassVar[bool] = True

    def __init__(self, in_keys: Sequence[Any], names: Sequence[str], prefix: Any) -> None:
        super().__init__()
        for key in (*in_keys, *(() if prefix is None else (prefix,))):
            if not isinstance(key, UnraveledKey):
                raise ConfigError(f"got key {key!r}; allowed are a string and a flat tuple of strings")
        if len(in_keys) != len(self.roles):
            raise ConfigError(
                f"got {len(in_keys)} in_keys; {type(self).__name__} reads {len(self.roles)}, in this order: "
                f"{', '.join(self.roles)}"
            )
        self.in_keys = list(in_keys)
        self.prefix = prefix
        path = () if prefix is None else ((prefix,) if isinstance(prefix, str) else prefix)
        self.out_keys = [(*path, name) if path else name for name in names]
        self._names = list(names)

    @abstractmethod
    def _values(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the value and its parts, by name, of one data set."""

    @final
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the value and its parts and write them under ``out_keys``, attached to the graph.

        Every batch dimension of the tensordict is an independent data set.

        Args:
            tensordict: Holds ``(*batch_size, batch, tokens, features)`` under the in keys, masks without features.

        Returns:
            The same tensordict.

        Raises:
            TypeError: Anything but a tensordict.
            KeyError: An in key is missing.
            ValueError: Shapes that do not fit.
        """
        if not is_tensor_collection(tensordict):
            raise TypeError(
                f"{type(self).__name__} got {type(tensordict).__name__}; it takes a TensorDict that holds "
                f"{self.in_keys}"
            )
        inputs = [self._read(tensordict, key, role) for key, role in zip(self.in_keys, self.roles, strict=True)]
        sets = tensordict.batch_size
        flat = [x.flatten(0, len(sets) - 1) if sets else x.unsqueeze(0) for x in inputs]
        found = [self._values(one) for one in zip(*flat, strict=True)]
        for key, name in zip(self.out_keys_source, self._names, strict=True):
            values = torch.stack([parts[name] for parts in found]) if found else flat[0].new_zeros(0)
            tensordict.set(key, values.reshape((*sets, *values.shape[1:])))
        return tensordict

    def _read(self, tensordict: TensorDictBase, key: Any, role: str) -> Tensor:
        x = tensordict.get(key, None)
        if not isinstance(x, Tensor):
            held = [str(k) for k in tensordict.keys(include_nested=True, leaves_only=True)]
            near = closest(str(key), held)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise MissingKeyError(f"the tensordict has no {key!r}{hint} It holds: {', '.join(held) or 'nothing'}")
        least = tensordict.batch_dims + (2 if role == "mask" else 3)
        if self._sized and x.ndim < least:
            raise ConfigError(
                f"{key!r} has shape {tuple(x.shape)} in a tensordict of batch_size {tuple(tensordict.batch_size)}, "
                "whose dimensions are independent data sets; the rows that are compared are one data set: use "
                "TensorDict(..., batch_size=[])"
            )
        return x

    def __repr__(self) -> str:
        """Show the constructor arguments, as they were given."""
        arguments = (f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)
        return f"{type(self).__name__}({', '.join(arguments)})"
