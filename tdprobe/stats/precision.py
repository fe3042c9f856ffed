"""What a device does with float32, and how much it takes at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdprobe.stats.state import working_dtype

# Of a product that is as large as those of distances: small ones may be computed otherwise.
ROWS, INNER, COLUMNS = 256, 128, 2048
# A CPU keeps what it works on in its cache; for a GPU starting a step is what takes long, so it takes more at once.
MORE = 8


def at_once(numbers: int, device: torch.device, more: int = MORE) -> int:
    """Return how many numbers to take in one step, given how many a CPU takes, and how many times that a GPU does."""
    return numbers if device.type == "cpu" else more * numbers


def float32_is_exact(device: torch.device) -> bool:
    """Tell whether products of float32 are computed in float32, and not in TF32 or bfloat16."""
    # There are several switches, by backend, old and new; what they do shows in a product.
    left, right = torch.zeros(ROWS, INNER, device=device), torch.ones(INNER, COLUMNS, device=device)
    left[:, 0] = 1 + 2.0**-20
    return bool((left @ right == left[0, 0]).all())


def product_dtype(rows: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype for products: `working_dtype`, float64 where the user has switched float32 to TF32."""
    dtype = working_dtype(rows)
    return dtype if dtype == torch.float64 or float32_is_exact(rows[0].device) else torch.float64


def summed_dtype(rows: Sequence[Tensor]) -> torch.dtype:
    """Return `product_dtype` without the trial product on the CPU, where it would cost as much as a small update."""
    return working_dtype(rows) if rows[0].device.type == "cpu" else product_dtype(rows)
