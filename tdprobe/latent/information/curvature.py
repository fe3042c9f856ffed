"""How much the path of a layer through the tokens of a text bends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdprobe._types import Float
from tdprobe.errors import ConfigError
from tdprobe.estimator import SupervisedEstimator
from tdprobe.registry import Spec, register
from tdprobe.stats.state import Statistic, working_dtype
from tdprobe.stats.turns import Turns, TurnsState, turning_angles


@register(
    Spec(
        name="curvature",
        kind="supervised",
        symmetric=False,
        bounds=(0.0, torch.pi),
        larger_means="more bent paths from token to token",
        invariant_to=frozenset({"permutation", "orthogonal", "isotropic scaling", "translation"}),
        needs=("turns",),
        cost="n d",
        reference="Hosseini, Fedorenko 2023, Large language models implicitly learn to straighten neural sentence "
        "trajectories",
    )
)
class CurvatureEstimator(SupervisedEstimator):
    """Measure the mean angle between successive steps from token to token, in radians.

    With steps ``v_k = x_(k+1) - x_k`` of a text: the mean of ``arccos(v_k.v_(k+1) / (|v_k| |v_(k+1)|))`` over all k and
    all texts. 0 on a straight line, pi where every step takes the last one back; in many dimensions pi / 2 where steps
    are independent, and 2 pi / 3 where tokens are. Steps of length 0 have no direction and no angle.

    Rows of one text come in order. In a stream a text that goes on in the next portion of rows loses two angles: a
    long ``rows_per_update`` makes them few. `LayerScoring` reads the number of each text from the call:
    ``hooked(**inputs, text=numbers)``; tokens that are left out, outliers among them, are stepped over.

    Args:
        in_key: Key of ``(*lead, n, d)``.
        text_key: Key of the number of the text of each row, ``(*lead, n)``.
        out_key: Key to write, ``(*lead,)`` float32.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [5.0, 0.0], [6.0, 0.0], [7.0, 0.0]])
        >>> td = TensorDict({"data": x, "text": torch.tensor([0, 0, 0, 1, 1, 1])})
        >>> CurvatureEstimator()(td)["curvature"].rad2deg()
        tensor(45.)

    References:
        Hosseini, Fedorenko 2023, Large language models implicitly learn to straighten neural sentence trajectories.
        Henaff, Goris, Simoncelli 2019, Perceptual straightening of natural videos.
    """

    def __init__(self, in_key: Any = "data", text_key: Any = "text", out_key: Any = "curvature") -> None:
        super().__init__([in_key, text_key], [out_key])
        self.in_key, self.text_key, self.out_key = in_key, text_key, out_key

    def statistic(self) -> Statistic:
        """Return `Turns`."""
        return Turns()

    def score(self, state: TurnsState) -> TensorDict:
        """Score each layer.

        Returns:
            ``"score"``, ``(*lead, l, 1)`` float64, NaN without any angle or with values that are not finite;
            ``"finite"``.
        """
        angle = state.total / state.count
        return TensorDict({"score": angle.unsqueeze(-1), "finite": state.total.isfinite()})

    def _outputs(self, scores: TensorDict) -> Sequence[Tensor]:
        return [scores["score"][..., 0, 0]]


def trajectory_curvature(
    x: Float[Tensor, "*b t d"], mask: Tensor | None = None
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Measure the mean angle between successive steps from token to token, text by text (`CurvatureEstimator`).

    Args:
        x: One vector per token, in order; any real dtype.
        mask: Tokens that count, ``(*b, t)``, True or not 0, such as an attention mask; the path goes from one to the
            next of them, so padding may stand on either side.

    Returns:
        The mean angle of each text, in radians, float64, NaN without any angle or with a value that is not finite; and
        the number of its angles, float64.

    Raises:
        ConfigError: A mask of another shape.

    Example:
        >>> square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> angle, count = trajectory_curvature(square)
        >>> round(float(angle.rad2deg()), 6), int(count)
        (90.0, 2)

    References:
        Hosseini, Fedorenko 2023, Large language models implicitly learn to straighten neural sentence trajectories.
    """
    working_dtype([x])
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ConfigError(
            f"the mask has shape {tuple(mask.shape)}, the tokens {tuple(x.shape[:-1])}; give one value per token"
        )
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        kept = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask.to(x.device).bool()
        # Tokens that count move to the front, in their order.
        order = kept.logical_not().long().argsort(dim=-1, stable=True)
        x, kept = x.detach().gather(-2, order.unsqueeze(-1).expand_as(x)), kept.gather(-1, order)
        total, count = turning_angles(x.masked_fill(~kept.unsqueeze(-1), 0.0), kept[..., 1:])
    return total / count, count
