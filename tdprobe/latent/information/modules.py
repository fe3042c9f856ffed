"""The entropy functions as TensorDict modules: estimators on tensors in hand, losses in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from tdprobe.latent.information.entropy import (
    gaussian_mixture_entropy,
    mutual_information_sub_batch,
    square_mahalanobis_distance,
)
from tdprobe.latent.information.gaussian_mixture import (
    ASSIGNMENT,
    ESTIMATORS,
    LOG_CONSTANTS,
    MAHALANOBIS,
    METHODS,
    REDUCTIONS,
    Method,
    Pairing,
)
from tdprobe.latent.information.information_module import InformationModule
from tdprobe.latent.information.inputs import check_choice
from tdprobe.latent.information.mutual_information import CONDITIONALS, ENTROPY, MUTUAL_INFORMATION, STD_LOG

DISTANCE = "square_mahalanobis_distance"


class SquareMahalanobisDistance(InformationModule):
    """Compute `square_mahalanobis_distance` of tensors in a tensordict.

    Args:
        in_keys: Keys of x, y, stds and mask.
        prefix: Key below which ``"square_mahalanobis_distance"`` is written; ``None``: the top.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ConfigError: A bad key or reduction.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> one = torch.ones(2, 3)
        >>> td = TensorDict({"x": 2 * one, "y": 0 * one, "stds": one, "mask": one[:, 0]})
        >>> SquareMahalanobisDistance()(td)["square_mahalanobis_distance"]
        tensor(6.)
    """

    roles = ("x", "y", "stds", "mask")
    _sized = False

    def __init__(
        self,
        in_keys: Sequence[Any] = roles,
        prefix: Any = None,
        *,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__(in_keys, [DISTANCE], prefix)
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    def _values(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        return {DISTANCE: square_mahalanobis_distance(*inputs, reduction=self.reduction)}


class GaussianMixtureEntropy(InformationModule):
    """Compute `gaussian_mixture_entropy` of tensors in a tensordict, with its parts.

    Args:
        in_keys: Keys of the clean and the transformed embeddings, means, stds and mask.
        prefix: Key below which ``"gaussian_mixture_entropy_loss"`` and its parts are written; ``None``: the top.
        estimator: ``"pairwise"`` or ``"mixture"``.
        method: ``"loop"`` or ``"matmul"``.

    Raises:
        ConfigError: A bad key or option.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x, one = torch.zeros(3, 2, 4), torch.ones(3, 2, 4)
        >>> td = TensorDict({"clean": x, "transformed": x, "means": x, "stds": one, "mask": one[..., 0]})
        >>> round(GaussianMixtureEntropy()(td)["gaussian_mixture_entropy_loss"].item(), 4)  # 2 log(2 pi)
        3.6758
    """

    roles = ("clean", "transformed", "means", "stds", "mask")

    def __init__(
        self,
        in_keys: Sequence[Any] = roles,
        prefix: Any = None,
        *,
        estimator: Pairing = "pairwise",
        method: Method = "loop",
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("method", method, METHODS)
        super().__init__(in_keys, [ENTROPY, *_parts(estimator)], prefix)
        self.estimator, self.method = estimator, method

    def _values(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        value = gaussian_mixture_entropy(*inputs, losses, estimator=self.estimator, method=self.method)
        return {ENTROPY: value, **losses}


class MutualInformationSubBatch(InformationModule):
    """Compute `mutual_information_sub_batch` of tensors in a tensordict, with its parts.

    Args:
        in_keys: Keys of means, stds, mask, and the clean and the noisy embeddings.
        prefix: Key below which ``"mutual_information_loss"`` and its parts are written; ``None``: the top.
        combine_masks: Both tokens of a pair must be kept; otherwise that of the point only.
        estimator: ``"pairwise"`` or ``"mixture"``.
        conditional: ``"analytic"`` or ``"sampled"``.
        symmetric: Average over both halves as points.
        method: ``"loop"`` or ``"matmul"``.

    Raises:
        ConfigError: A bad key or option.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x, std = torch.randn(8, 5, 3), torch.full((8, 5, 3), 2.0, requires_grad=True)
        >>> noisy = x + std * torch.randn_like(x)
        >>> td = TensorDict({"means": 0 * x, "stds": std, "mask": x[..., 0] * 0 + 1, "clean": x, "noisy": noisy})
        >>> loss = MutualInformationSubBatch()
        >>> loss(td)["mutual_information_loss"].backward()
        >>> bool((std.grad.sum() < 0).item())  # more noise tells less
        True
    """

    roles = ("means", "stds", "mask", "clean", "noisy")

    def __init__(
        self,
        in_keys: Sequence[Any] = roles,
        prefix: Any = None,
        *,
        combine_masks: bool = True,
        estimator: Pairing = "pairwise",
        conditional: Literal["analytic", "sampled"] = "analytic",
        symmetric: bool = False,
        method: Method = "loop",
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("conditional", conditional, CONDITIONALS)
        check_choice("method", method, METHODS)
        super().__init__(in_keys, [MUTUAL_INFORMATION, ENTROPY, STD_LOG, *_parts(estimator)], prefix)
        self.combine_masks, self.estimator, self.conditional = combine_masks, estimator, conditional
        self.symmetric, self.method = symmetric, method

    def _values(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        options: Any = {"estimator": self.estimator, "conditional": self.conditional, "method": self.method}
        mutual_information_sub_batch(*inputs, self.combine_masks, losses, symmetric=self.symmetric, **options)
        return losses


def _parts(estimator: Pairing) -> list[str]:
    return [MAHALANOBIS, LOG_CONSTANTS, *([ASSIGNMENT] if estimator == "mixture" else [])]
