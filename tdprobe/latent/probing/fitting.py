"""Make what a hook hands over fit for fitting: it may be half precision, or made under inference mode."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from tdprobe.errors import ConfigError
from tdprobe.hooks import first_tensor, keep


@contextmanager
def own_mode(*, grad: bool) -> Generator[None]:
    """Leave the autograd, autocast and inference mode that the caller chose for the model."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind in {"cpu", _accelerator()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def normal(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd can save: one made under inference mode is copied."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def as_rows(data: Any) -> Tensor:
    """Turn what a hook handed over into one row per sample: the default preprocessing of probes.

    Of a tuple or ``ModelOutput`` the first tensor is taken. It is detached, half precision becomes float32,
    and every axis but the first is flattened: (batch, tokens, width) gives (batch, tokens * width).

    Raises:
        ConfigError: There is no tensor.

    Example:
        >>> as_rows((torch.zeros(2, 3, 4), None)).shape
        torch.Size([2, 12])
    """
    value = first_tensor(data)
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"a probe got a {type(data).__name__} without a tensor to read; pass a data_preprocess_callback "
            "that returns the rows, or leave this module out of the pattern"
        )
    value = value.detach()
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    rows = keep(value)
    return rows.flatten(1) if rows.ndim > 1 else rows.reshape(-1, 1)


def readable(estimator: Any, values: Sequence[Any]) -> list[Any]:
    """Return rows and labels where an estimator can read them: for scikit-learn, tensors of a GPU come to the CPU."""
    if not any(cls.__module__.partition(".")[0] == "sklearn" for cls in type(estimator).__mro__):
        return list(values)
    return [value.cpu() if isinstance(value, Tensor) else value for value in values]


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type
