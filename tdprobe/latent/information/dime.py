"""Difference of matrix-based entropies: what two layers have in common beyond what any two would."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.latent.information.kernel_pairs import KernelPairEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats.joint_entropy import JointEntropy, JointEntropyTable


@register(
    Spec(
        name="dime",
        kind="pair",
        symmetric=True,
        bounds=(float("-inf"), float("inf")),
        larger_means="more in common",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="n^2 d per layer and n^2 per pair, for a bank of n rows; n^3 per pair and shuffle for orders other than 2",
        reference="Skean et al. 2023, DiME: maximizing mutual information by a difference of matrix-based entropies",
    )
)
class DimeEstimator(KernelPairEstimator):
    """Measure the difference of matrix-based entropies of two layers, in nats.

    ``E_P[S(A, P B P')] - S(A, B)``: the matrix-based mutual information less its mean over shuffles P of the samples
    of one layer, under which the entropies of single layers stay. 0 on average for independent layers, whatever the
    kernel.

    For order 2 the mean over all shuffles follows from the entropies of single layers, and costs nothing. It is the
    logarithm of the mean there, which is larger than the mean of logarithms by half their variance; ``permutations``
    asks for the definition.

    Args:
        in_key_a: Key of ``(*lead, n, d_a)``.
        in_key_b: Key of ``(*lead, n, d_b)``.
        out_key: Key to write, ``(*lead,)`` float32.
        alpha: Order, above 0. Order 2 needs no eigenvalues; others take those of an n x n matrix for every pair and
            shuffle, so banks of a few hundred rows are advised.
        kernel: ``"rbf"`` or ``"linear"``.
        bandwidth: Of ``"rbf"``: standard deviation in units of the median distance between rows that differ.
        center: Subtract the mean, in the space of the kernel, before the diagonal is scaled to 1.
        normalize_rows: Divide each row by its length, before anything else.
        permutations: Shuffles behind the mean, the same ones for all pairs; each counts forth and back. By default
            the mean over all of them for order 2, and 4 for other orders.
        seed: Another seed draws other shuffles.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, order, kernel, bandwidth, bank size or number of permutations.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> x, y = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
        >>> td = TensorDict({"data_a": x, "data_b": x + y, "other": y})
        >>> DimeEstimator(out_key="related")(td)["related"] > 10 * DimeEstimator("data_a", "other")(td)["dime"].abs()
        tensor(True)

    References:
        Skean, Osorio, Brockmeier, Sanchez Giraldo 2023, DiME: maximizing mutual information by a difference of
        matrix-based entropies.
    """

    def __init__(
        self,
        in_key_a: Any = "data_a",
        in_key_b: Any = "data_b",
        out_key: Any = "dime",
        alpha: float = 2.0,
        kernel: str = "rbf",
        *,
        bandwidth: float = 1.0,
        center: bool = False,
        normalize_rows: bool = False,
        permutations: int | None = None,
        seed: int = 0,
        bank_size: int = 1024,
    ) -> None:
        if permutations is not None and permutations < 1:
            raise ConfigError(f"got permutations={permutations!r}; allowed are integers from 1 on, and None")
        self._shuffles = (0 if alpha == 2 else 4) if permutations is None else permutations
        config = JointEntropy(alpha, kernel, bandwidth, center, normalize_rows, self._shuffles, seed)
        super().__init__((in_key_a, in_key_b), out_key, config, bank_size)
        self.permutations, self.seed = permutations, seed

    def _value(self, table: JointEntropyTable) -> Float[Tensor, "*lead l l"]:
        shuffled = table.shuffled[..., : self._shuffles, :, :].mean(-3) if self._shuffles else table.expected()
        return shuffled - table.joint
