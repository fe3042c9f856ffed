"""A model and a factory whose every value is known, for tests of contexts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdprobe.contexts import HookingContextFactory, Site
from tdprobe.hooks import Hook, MultiHookHandle
from tdprobe.modules import HookedModule

X = torch.ones(1, 2)


def chain() -> nn.Sequential:
    """Three layers that double, add one and negate."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for layer, scale, shift in zip(model, (2, 1, -1), (0, 1, 0), strict=True):
        layer.weight.data, layer.bias.data = scale * torch.eye(2), torch.full((2,), float(shift))
    return model


class Editing(HookingContextFactory):
    """Applies a function to the output of one child of the model."""

    def __init__(self, child: str, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.child = child
        self.edit = edit

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context, site = module.hooking_context, Site(self.child)
        context.sites.append(site)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not context.gate.admits():
                return None
            context.fired(site)
            return self.edit(output)

        place = context.model.get_submodule(self.child)
        return MultiHookHandle([Hook(place, "fwd", hook, edits=True, order=context.gate.number)])


def values(context: Any) -> dict[str, float]:
    return {name: context.cache[name][0, 0].item() for name in context.cache.keys()}
