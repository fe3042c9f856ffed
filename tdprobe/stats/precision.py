"""What a device does with float32."""

from __future__ import annotations

import torch

# Of a product that is as large as those of distances: small ones may be computed otherwise.
ROWS, INNER, COLUMNS = 256, 128, 2048


def float32_is_exact(device: torch.device) -> bool:
    """Tell whether products of float32 are computed in float32, and not in TF32 or bfloat16."""
    # There are several switches, by backend, old and new; what they do shows in a product.
    left, right = torch.zeros(ROWS, INNER, device=device), torch.ones(INNER, COLUMNS, device=device)
    left[:, 0] = 1 + 2.0**-20
    return bool((left @ right == left[0, 0]).all())
