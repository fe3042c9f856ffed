"""How many directions a layer fills, as its singular values say."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.spectrum_estimator import SpectrumEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats.spectrum import SpectrumTable, renyi_entropy


@register(
    Spec(
        name="rankme",
        kind="layer",
        symmetric=False,
        bounds=(1.0, float("inf")),
        larger_means="more dimensions",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling"}),
        needs=("moments",),
        cost="n d^2 + d^3",
        reference="Garrido et al. 2023, RankMe: assessing the downstream performance of pretrained representations",
    )
)
class RankMeEstimator(SpectrumEstimator):
    """Measure the effective rank of the rows of a layer.

    ``exp(-sum p log p)`` with ``p`` the singular values of the matrix of rows divided by their sum. The paper adds
    1e-7 to each p against log 0; here ``0 log 0`` is 0, which changes the exponent by less than ``2e-6 d``.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        out_key: Key to write, ``(*lead,)`` float32.
        center: Subtract the column means, which the paper does not.
        normalize_rows: Divide each row by its length, before centring.

    Raises:
        ConfigError: A bad key or flag.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> round(float(RankMeEstimator()(TensorDict({"data": 3 * torch.eye(4)}))["rankme"]), 4)
        4.0

    References:
        Garrido, Balestriero, Najman, LeCun 2023, RankMe: assessing the downstream performance of pretrained
        self-supervised representations by their rank.
        Roy, Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """

    def __init__(
        self, in_key: Any = "data", out_key: Any = "rankme", *, center: bool = False, normalize_rows: bool = False
    ) -> None:
        super().__init__(in_key, out_key, center, normalize_rows)

    def _value(self, table: SpectrumTable) -> Float[Tensor, "*lead l"]:
        roots = table.shares.sqrt()
        return renyi_entropy(roots / roots.sum(-1, keepdim=True)).exp()
