"""Steer a model: change what some of its modules return, while it runs or generates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdprobe.contexts import Site
from tdprobe.errors import ConfigError, StateError, unknown
from tdprobe.hooks import Hook, lazy_copy, replace_first_tensor
from tdprobe.hooks.gate import in_backward
from tdprobe.latent.activation_addition import ActivationAddition
from tdprobe.latent.path_sites import PathContext, PathFactory, tensor_at
from tdprobe.latent.steering_direction import SteeringDirection
from tdprobe.stream.edits import write_rows
from tdprobe.stream.rows import token_rows
from tdprobe.stream.tokens import Selection

Vector = Tensor | Mapping[str, Tensor] | TensorDictBase


class SteeringVectors(PathFactory):
    r"""Change the output of modules: :math:`h \leftarrow h + \text{scale} \cdot v`, or any function of it.

    Of a tuple or ``ModelOutput`` the first tensor is changed and everything else stays. Edits are made out of place, in
    the dtype and on the device of the activation, for every row of the batch, also in ``generate()``.

    Args:
        modules_to_steer: Module paths, such as ``"model.layers[10]"`` or ``"model.layers[5:8]"``.
        steer_fn: Called as ``steer_fn(module_key=path, output=tensor)``; returns the new tensor, or ``None`` to leave
            it. With ``tokens``, ``output`` is the (n, width) rows of the selected tokens.
        vector: In place of ``steer_fn``: (width,) to add everywhere, or any shape that broadcasts to the activation; a
            mapping or TensorDict gives one per path, as :class:`ActivationAddition` returns them.
        scale: Factor of ``vector``; with 0 the model computes bit for bit what it computes without hooks.
        tokens: Steer only these tokens, such as ``"last"`` (the end of the prompt), ``"prompt"``, ``"generated"`` or
            positions, which stay absolute in ``generate()``; see :class:`tdprobe.stream.tokens.TokenClause`.
        skip_first: Leave out the first real tokens of each row.
        required: A path that leads nowhere, or a module that never runs, are errors.

    Raises:
        ConfigError: An argument is not allowed; on enter also for a path that leads nowhere.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Identity())
        >>> with SteeringVectors(["[0]"], vector=torch.ones(3)).prepare(model) as hooked:
        ...     steered = hooked(torch.zeros(2, 4))
        >>> torch.equal(steered, model(torch.zeros(2, 4)) + 1)
        True

    References:
        Turner et al., Steering Language Models With Activation Engineering, 2023, https://arxiv.org/abs/2308.10248.
        Rimsky et al., Steering Llama 2 via Contrastive Activation Addition, 2023, https://arxiv.org/abs/2312.06681.
    """

    def __init__(
        self,
        modules_to_steer: Sequence[str],
        steer_fn: Callable[..., Any] | None = None,
        *,
        vector: Vector | None = None,
        scale: float = 1.0,
        tokens: Any = None,
        skip_first: int = 0,
        required: bool = True,
    ) -> None:
        super().__init__(modules_to_steer, tokens=tokens, skip_first=skip_first, required=required)
        if (steer_fn is None) == (vector is None):
            raise ConfigError(
                "steering takes either steer_fn or vector=, and got " + ("neither" if vector is None else "both")
            )
        if steer_fn is not None and not callable(steer_fn):
            raise ConfigError(
                f"steer_fn is a function of module_key and output, got a {type(steer_fn).__name__}; see vector="
            )
        if vector is not None and not isinstance(vector, (Tensor, Mapping, TensorDictBase)):
            raise ConfigError(f"vector is a tensor or a mapping from paths to tensors, got a {type(vector).__name__}")
        if isinstance(tokens, str) and tokens == "mean":
            raise ConfigError("tokens='mean' is no place to write to; 'all' steers every real token")
        self.steer_fn = steer_fn
        self.vector = vector
        self.scale = scale

    def _site_hook(self, context: PathContext, module: nn.Module, site: Site) -> Hook:
        change = self._adding(site.name) if self.steer_fn is None else self._calling(site.name)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not context.acts:
                return None
            value = tensor_at(output, site)
            selection = None if context.clause is None else context.selection()
            if selection is not None and not selection.n:
                return None
            if not in_backward():
                context.fired(site)
            new = change(value) if selection is None else _change_rows(site, value, selection, change)
            return None if new is None else replace_first_tensor(output, new.to(value))

        return Hook(module, "fwd", hook, edits=True, order=context.gate.number)

    def _calling(self, path: str) -> Callable[[Tensor], Tensor | None]:
        steer_fn: Any = self.steer_fn

        def change(value: Tensor) -> Tensor | None:
            new = steer_fn(module_key=path, output=value)
            if new is not None and not isinstance(new, Tensor):
                raise StateError(
                    f"steer_fn returned a {type(new).__name__} for {path!r}, whose value is a {type(value).__name__}; "
                    "return a tensor of its shape, or None to leave it"
                )
            return new

        return change

    def _adding(self, path: str) -> Callable[[Tensor], Tensor | None]:
        vector = self._vector_of(path)
        # Not even adding 0: -0.0 + 0.0 is 0.0, and 0 x inf is NaN.
        nothing = not vector.requires_grad and (self.scale == 0 or not bool(vector.any()))

        def change(value: Tensor) -> Tensor | None:
            _check_width(path, vector, value)
            return None if nothing else value + (self.scale * vector).to(value)

        return change

    def _vector_of(self, path: str) -> Tensor:
        vector: Any = self.vector
        if isinstance(vector, Tensor):
            return vector
        if path not in vector.keys():
            raise ConfigError(unknown("module path among the vectors", path, map(str, vector.keys())))
        return vector[path]


def _change_rows(
    site: Site, value: Tensor, selection: Selection, change: Callable[[Tensor], Tensor | None]
) -> Tensor | None:
    rows = token_rows(site.name, value, selection)
    # A steer_fn that writes in place must not reach the model through a view.
    new = change(lazy_copy(rows) if rows._is_view() else rows)
    return None if new is None else write_rows(site.name, value, selection, new)


def _check_width(path: str, vector: Tensor, value: Tensor) -> None:
    fits = vector.ndim <= value.ndim and vector.ndim and vector.shape[-1] == value.shape[-1]
    if not fits or any(a not in (1, b) for a, b in zip(reversed(vector.shape), reversed(value.shape), strict=False)):
        raise ConfigError(
            f"the steering vector of shape {tuple(vector.shape)} does not fit the activation of shape "
            f"{tuple(value.shape)} at {path!r}; its last axis is the width, {value.shape[-1]}"
        )


__all__ = ["ActivationAddition", "SteeringDirection", "SteeringVectors"]
