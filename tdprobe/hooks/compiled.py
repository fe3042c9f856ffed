"""Compiled code and hooks: code compiled without a hook would never call it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from tdprobe.hooks.match import walk


def stay_out_of_graphs(function: FunctionType) -> None:
    """Let compiled code call ``function`` as it is, instead of tracing into it.

    What hooks do, such as looking up whose call it is, cannot become part of a graph. ``torch.compiler.disable``
    does the same at a microsecond per call.
    """
    function._torchdynamo_disable = True  # ty: ignore[missing-attribute]
    frames = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


@contextmanager
def recompiled(module: nn.Module) -> Generator[None]:
    """Throw compiled code away before and after a block, if any part of ``module`` has some."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not _has_compiled(dynamo) or not _is_compiled(module, dynamo):
        yield
        return
    dynamo.reset()
    try:
        yield
    finally:
        dynamo.reset()


def _has_compiled(dynamo: Any) -> bool:
    """Tell whether anything has been compiled at all, which spares most users the walk through the model."""
    seen = getattr(getattr(getattr(dynamo, "convert_frame", None), "input_codes", None), "seen", None)
    return seen is None or len(seen) > 0


def _is_compiled(module: nn.Module, dynamo: Any) -> bool:
    # Straight dictionary look-ups: hasattr on a module that lacks a name is slow, and a model has hundreds.
    parts = [part for _, part in walk(module)]
    if any("_orig_mod" in part._modules or part.__dict__.get("_compiled_call_impl") is not None for part in parts):
        return True
    # A model does not know of the compiled modules made from it; the code of its class does.
    entries = getattr(dynamo.eval_frame, "_debug_get_cache_entry_list", None)
    codes = {getattr(kind.forward, "__code__", None) for kind in {type(part) for part in parts}} - {None}
    return entries is not None and any(entries(code) for code in codes)
