"""Places in a model where a tensor is read or written, and can be undone."""

from tdprobe.hooks.direction import DIRECTIONS, HookDirection, check_callback, get_direction
from tdprobe.hooks.gate import Gate
from tdprobe.hooks.handles import EarlyStop, Hook, MultiHookHandle
from tdprobe.hooks.match import match_modules, named_submodules
from tdprobe.hooks.values import first_tensor, keep, lazy_copy, mirror_gradient, replace_first_tensor

__all__ = [
    "DIRECTIONS",
    "EarlyStop",
    "Gate",
    "Hook",
    "HookDirection",
    "MultiHookHandle",
    "check_callback",
    "first_tensor",
    "get_direction",
    "keep",
    "lazy_copy",
    "match_modules",
    "mirror_gradient",
    "named_submodules",
    "replace_first_tensor",
]
