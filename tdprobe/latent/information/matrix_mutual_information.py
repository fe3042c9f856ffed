"""Mutual information of two layers from their kernel matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.information.kernel_pairs import KernelPairEstimator, mutual_information
from tdprobe.registry import Spec, register
from tdprobe.stats.joint_entropy import JointEntropy, JointEntropyTable


@register(
    Spec(
        name="matrix_mutual_information",
        kind="pair",
        symmetric=True,
        bounds=(float("-inf"), float("inf")),
        larger_means="more in common",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n^2 per pair, for a bank of n rows; n^3 per pair for orders other than 2",
        reference="Sanchez Giraldo et al. 2015, Measures of entropy from data using infinitely divisible kernels",
    )
)
class MatrixMutualInformationEstimator(KernelPairEstimator):
    """Measure the matrix-based mutual information of two layers, in nats.

    ``I(A; B) = S(A) + S(B) - S(A, B)`` of matrix-based Renyi entropies (`MatrixEntropyEstimator`,
    `MatrixJointEntropyEstimator`). At most the smaller of the two entropies, since joint entropy is at least the
    larger. For orders other than 1 it may be a little negative, and few samples of independent layers have some in
    common by themselves, which `DimeEstimator` removes.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        alpha: Order, above 0. Order 2 needs no eigenvalues; others take those of an n x n matrix for every pair, so
            banks of a few hundred rows are advised.
        kernel: ``"rbf"`` or ``"linear"``.
        bandwidth: Of ``"rbf"``: standard deviation in units of the median distance between rows that differ.
        center: Subtract the mean, in the space of the kernel, before the diagonal is scaled to 1.
        normalize_rows: Divide each row by its length, before anything else.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, order, kernel, bandwidth or bank size.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        >>> td = TensorDict({"data_a": x, "data_b": -x})
        >>> MatrixMutualInformationEstimator(kernel="linear")(td)["matrix_mutual_information"].exp()
        tensor(2.)

    References:
        Sanchez Giraldo, Rao, Principe 2015, Measures of entropy from data using infinitely divisible kernels.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "matrix_mutual_information",
        alpha: float = 2.0,
        kernel: str = "rbf",
        *,
        bandwidth: float = 1.0,
        center: bool = False,
        normalize_rows: bool = False,
        bank_size: int = 1024,
    ) -> None:
        config = JointEntropy(alpha, kernel, bandwidth, center, normalize_rows)
        super().__init__((in_key_a, in_key_b), out_key, config, bank_size)

    def _value(self, table: JointEntropyTable) -> Float[Tensor, "*lead l l"]:
        return mutual_information(table)
