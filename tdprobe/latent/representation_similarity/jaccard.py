"""Jaccard similarity of neighbourhoods: common neighbours among all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.representation_similarity.neighborhood_estimator import Metric, NeighborhoodEstimator
from tdprobe.registry import Mode, Spec, register
from tdprobe.stats.neighborhoods import Neighborhoods


@register(
    Spec(
        name="jaccard",
        kind="pair",
        symmetric=True,
        bounds=(0.0, 1.0),
        larger_means="more common neighbours",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n k per pair, for a bank of n rows",
        reference="Wang et al. 2020, Towards understanding the instability of network embedding",
    )
)
class JaccardEstimator(NeighborhoodEstimator):
    """Measure the Jaccard similarity of the k nearest neighbours of a row in two representations.

    ``1 / n * sum_i |N_A(i) & N_B(i)| / |N_A(i) | N_B(i)|``.

    Equal rows are each other's nearest neighbours, and tied rows share the places that are left: of two shares of one
    row the smaller is common, and the larger in the union. So the order of rows never matters.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        k: Neighbours, 1 or more.
        metric: ``"euclidean"``, or ``"cosine"``, which translation changes.
        bank_size: Rows to keep of a stream; a one-shot call uses all.
        mode: ``"strict"`` or ``"robust"``; they agree.

    Raises:
        ConfigError: A bad key, ``k`` below 1, an unknown metric or mode.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.arange(12.0).square().unsqueeze(1)
        >>> JaccardEstimator(k=2)(TensorDict({"data_a": x, "data_b": 3 - x}))["jaccard"]
        tensor(1.)

    References:
        Wang, Rao, Chen, Wang 2020, Towards understanding the instability of network embedding.
        Klabunde, Schumacher, Strohmaier, Lemmerich 2023, Similarity of neural network models.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "jaccard",
        k: int = 10,
        metric: Metric = "euclidean",
        *,
        bank_size: int = 4096,
        mode: Mode = "strict",
    ) -> None:
        super().__init__([in_key_a, in_key_b], out_key, k, metric, bank_size=bank_size, mode=mode)

    def _terms(self, hoods: Neighborhoods, data: list[Tensor]) -> Float[Tensor, "r l l"]:
        common = hoods.overlap()
        return common / (2 * self.k - common)
