"""Joint entropy of two layers from the product of their kernel matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.latent.information.kernel_pairs import KernelPairEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats.joint_entropy import JointEntropy, JointEntropyTable


@register(
    Spec(
        name="matrix_joint_entropy",
        kind="pair",
        symmetric=True,
        bounds=(0.0, float("inf")),
        larger_means="more different samples in either",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n^2 per pair, for a bank of n rows; n^3 per pair for orders other than 2",
        reference="Sanchez Giraldo et al. 2015, Measures of entropy from data using infinitely divisible kernels",
    )
)
class MatrixJointEntropyEstimator(KernelPairEstimator):
    """Measure the joint matrix-based Renyi entropy of two layers, in nats.

    ``S_alpha(A o B / tr(A o B))`` with the elementwise product of the kernel matrices, which are scaled to a unit
    diagonal: samples are alike where they are alike in both layers. At least the entropy of either layer, and at most
    ``log n``. A row at the origin of the kernel's space (a row of zeros, linear) has no direction and counts as absent.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        alpha: Order, above 0. Order 2 needs no eigenvalues; others take those of an n x n matrix for every pair, so
            banks of a few hundred rows are advised.
        kernel: ``"rbf"`` or ``"linear"``.
        bandwidth: Of ``"rbf"``: standard deviation in units of the median distance between rows that differ.
        center: Subtract the mean, in the space of the kernel, before the diagonal is scaled.
        normalize_rows: Divide each row by its length, before anything else.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, order, kernel, bandwidth or bank size.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        >>> td = TensorDict({"data_a": x, "data_b": x[[0, 2, 1, 3]]})
        >>> MatrixJointEntropyEstimator(kernel="linear")(td)["matrix_joint_entropy"].exp()
        tensor(4.)

    References:
        Sanchez Giraldo, Rao, Principe 2015, Measures of entropy from data using infinitely divisible kernels.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "matrix_joint_entropy",
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
        return table.joint
