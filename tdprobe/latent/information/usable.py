"""Usable information: how many nats of a label a family of probes can read off a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.latent.information.predictive import Array, Family, canonical
from tdprobe.latent.information.probed_estimator import ProbedEstimator, single
from tdprobe.registry import Spec, register

FOLDS = 5


def pointwise_v_information(
    x: Any, y: Any, discrete: bool = True, *, folds: int = FOLDS, probe: Any = None, seed: int = 0
) -> Float[Tensor, " n"]:
    """Measure by how many nats seeing a row makes its label less surprising, row by row.

    ``log q(y_i | x_i) - log q(y_i)``; negative where the probe is misled. Its mean is `v_information`. Each row is
    held out once: neither q has been fitted to it.

    Args:
        x: Rows ``(n, d)``, numpy or torch.
        y: Labels ``(n,)``: integers that number classes, or any numbers with ``discrete=False``.
        discrete: Whether labels number classes.
        folds: Parts of the rows, each held out once.
        probe: Makes the probes; see `v_information`.
        seed: Of such probes.

    Returns:
        Nats, ``(n,)`` float64, in the order of the rows.

    Raises:
        ConfigError: As `v_information`.

    Example:
        >>> x = torch.tensor([-3.0, -2.5, -2.0, 2.0, 2.5, 3.0]).repeat(20).unsqueeze(1)
        >>> y = (x[:, 0] > 0).long()
        >>> y[0] = 1  # a wrong label
        >>> pointwise_v_information(x, y)[:2] > 0
        tensor([False,  True])

    References:
        Ethayarajh, Choi, Swayamdipta 2022, Understanding dataset difficulty with V-usable information.
    """
    _check_folds(folds)
    return torch.from_numpy(_gains(*single(x, y, discrete, probe, seed, 2 * folds), folds))


def v_information(
    x: Any, y: Any, discrete: bool = True, *, folds: int = FOLDS, probe: Any = None, seed: int = 0
) -> float:
    """Measure how many nats of a label a family of probes can read off rows.

    ``I_V(X -> Y) = H_V(Y) - H_V(Y | X)``: how much less surprising labels are, on average, for the best probe of the
    family than for one that sees nothing. Probes are fitted to all parts of the rows but one and asked about that one,
    so that overfitting does not count as information: the estimate is low rather than high for few rows, and may be
    below 0. Other than mutual information it grows where a layer makes the same facts easier to read.

    Linear probes are softmax regression for classes, at most the entropy of the labels; and for numbers a Gaussian
    around ridge regression, for which ``-0.5 log(1 - R^2)`` is what comes out for many rows.

    Args:
        x: Rows ``(n, d)``, numpy or torch.
        y: Labels ``(n,)``: integers that number classes, or any numbers with ``discrete=False``.
        discrete: Whether labels number classes.
        folds: Parts of the rows, each held out once, 2 or more.
        probe: ``None`` for linear probes, or what makes an unfitted `TorchEstimator` from the width of rows and the
            number of classes (``None`` for numbers), which is the family then.
        seed: Of such probes.

    Returns:
        Nats; NaN for numbers that are all the same.

    Raises:
        ConfigError: Fewer than ``2 * folds`` rows, shapes that do not fit, values that are not finite, or labels of
            classes that are no integers.

    Example:
        >>> x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
        >>> round(v_information(x, x[:, 0] > 0), 1)  # log 2
        0.7

    References:
        Xu, Zhao, Song, Stewart, Ermon 2020, A theory of usable information under computational constraints.
    """
    return float(pointwise_v_information(x, y, discrete, folds=folds, probe=probe, seed=seed).mean())


def _check_folds(folds: Any) -> None:
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ConfigError(f"got folds={folds!r}; allowed are integers from 2 on, such as {FOLDS}")


def _gains(x: Array, y: Array, family: Family, folds: int) -> Array:
    order, found = canonical(x, y), np.empty(len(y))
    # Dealt out in the order of the labels, so that every part has its share of each.
    part = np.empty(len(y), dtype=int)
    part[order] = np.arange(len(y)) % folds
    for fold in range(folds):
        fitted, held = order[part[order] != fold], order[part[order] == fold]
        seeing = family.seeing(x[fitted], y[fitted], x[held], y[held])
        found[held] = family.blind(y[fitted], y[held]) - seeing
    return found


@register(
    Spec(
        name="v_information",
        kind="supervised",
        symmetric=False,
        bounds=(float("-inf"), float("inf")),
        larger_means="more of the label that can be read",
        invariant_to=frozenset({"permutation", "isotropic scaling", "translation"}),
        needs=("reservoir",),
        cost="a probe per layer, label, fold and penalty, n d per step of each",
        reference="Xu et al. 2020, A theory of usable information under computational constraints",
    )
)
class VInformationEstimator(ProbedEstimator):
    """Measure how many nats of a label linear probes can read off a layer, see `v_information`.

    Rows count as independent: where each text has one label, ``tokens="last"`` or ``"mean"`` gives one row per text.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        labels: Key of the labels, ``(*lead, n, m)`` or ``(n,)``; or a list of keys.
        out_key: Key to write, ``(*lead, m)`` float32.
        discrete: Whether labels are integers that number classes: a bool, or one for each column.
        folds: Parts of the rows, each held out once.
        probe: Makes other probes, see `v_information`.
        seed: Of such probes.
        bank_size: Rows to keep of a stream; a one-shot call uses all.

    Raises:
        ConfigError: A bad key, fewer than 2 folds, or a probe that cannot be made.

    Example:
        >>> from tensordict import TensorDict
        >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> td = VInformationEstimator()(TensorDict({"data": x, "labels": (x[:, 1] > 0).long()}))
        >>> bool(td["v_information"] > 0.6)
        True

    References:
        Xu, Zhao, Song, Stewart, Ermon 2020, A theory of usable information under computational constraints.
    """

    def __init__(
        self,
        in_key: Any = "data",
        labels: Any = "labels",
        out_key: Any = "v_information",
        *,
        discrete: Any = True,
        folds: int = FOLDS,
        probe: Any = None,
        seed: int = 0,
        bank_size: int = 4096,
    ) -> None:
        super().__init__(in_key, labels, out_key, discrete, probe, seed, bank_size)
        _check_folds(folds)
        self.folds, self.least_rows = folds, 2 * folds

    def _value(self, x: Array, y: Array, family: Family) -> tuple[float, float]:
        gains = _gains(x, y, family, self.folds)
        return gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5
