"""A steering direction as a value: what it is, where it was read, where it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tdprobe.errors import ConfigError

if TYPE_CHECKING:
    from tdprobe.latent.steering_vectors import SteeringVectors

FORMAT = "tdprobe steering direction 1"


@dataclass(frozen=True, eq=False)
class SteeringDirection:
    """Hold a direction with everything that is needed to apply it again.

    Attributes:
        vector: (width,) floating.
        read: Path of the module whose activations it was computed from.
        write: Path of the module to whose output it is added.
        sign: 1 towards the positive side of the contrast, -1 away from it.
        scale: Factor by which it is added.
        tokens: Tokens it was read from, such as ``"last"``.
        method: How it was computed.

    Example:
        >>> import torch
        >>> direction = SteeringDirection(torch.ones(3), read="[0]", write="[0]", sign=-1)
        >>> with direction.steering().prepare(torch.nn.Sequential(torch.nn.Identity())) as hooked:
        ...     hooked(torch.zeros(1, 3)).tolist()
        [[-1.0, -1.0, -1.0]]
    """

    vector: Tensor
    read: str
    write: str
    sign: int = 1
    scale: float = 1.0
    tokens: str | int = "last"
    method: str = "mean_difference"

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor) or not self.vector.is_floating_point():
            raise ConfigError(f"a direction is a floating-point tensor, got {type(self.vector).__name__}")
        if self.sign not in (1, -1):
            raise ConfigError(f"the sign of a direction is 1 or -1, got {self.sign!r}")

    def steering(self, scale: float | None = None, **options: Any) -> SteeringVectors:
        """Return the factory that adds the direction.

        Args:
            scale: In place of the stored one.
            options: Keywords of :class:`~tdprobe.latent.steering_vectors.SteeringVectors`, such as ``tokens``.
        """
        from tdprobe.latent.steering_vectors import SteeringVectors

        factor = self.sign * (self.scale if scale is None else scale)
        return SteeringVectors([self.write], vector=self.vector, scale=factor, **options)

    def save(self, path: str | Path) -> None:
        """Write ``path.safetensors`` and ``path.json``."""
        path = Path(path)
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "vector"}
        save_file({"vector": self.vector.detach().contiguous().cpu()}, path.with_name(path.name + ".safetensors"))
        text = json.dumps({"format": FORMAT, **facts}, indent=2)
        path.with_name(path.name + ".json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SteeringDirection:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: The files are missing or hold something else.
        """
        path = Path(path)
        try:
            facts = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
            vector = load_file(path.with_name(path.name + ".safetensors"))["vector"]
            if facts.pop("format") != FORMAT:
                raise ConfigError(f"'{path.name}.json' is no file of this format ({FORMAT!r})")
            return cls(vector, **facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"cannot read a steering direction from '{path.name}.json' and '.safetensors': {error}"
            ) from error
