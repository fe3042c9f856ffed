"""A probe that torch trains."""

from __future__ import annotations

import warnings
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm.auto import tqdm

from tdprobe.errors import ConfigError
from tdprobe.latent.probing.fitting import normal, own_mode

# The label that torch's cross-entropy skips, as language models use it for padding.
IGNORED = -100


class TorchEstimator(nn.Module):
    """Train a small module by Adam on shuffled batches; subclasses say what it computes in ``forward(*Xs)``.

    With ``num_classes`` the loss is cross-entropy, without it the mean squared error. Fitting works wherever
    it is called: under ``no_grad``, ``inference_mode`` or autocast. Inputs are computed in the dtype of the
    parameters. ``torch.manual_seed`` decides the initial weights and the order of the batches; fitting itself
    leaves torch's random state as it was, so that a model with dropout draws what it would have drawn without
    the probe.

    Args:
        num_classes: How many classes; ``None`` for regression.
        epochs: Passes over the data in each ``fit``.
        lr: Learning rate of Adam.
        batch_size: Rows per step.
        device: Where parameters are made. Inputs are not moved.
        verbose: Show a progress bar.

    Raises:
        ConfigError: A number is not positive.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        epochs: int = 100,
        lr: float = 1e-3,
        batch_size: int = 128,
        device: torch.device | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        given = {"num_classes": num_classes, "epochs": epochs, "lr": lr, "batch_size": batch_size}
        for name, value in given.items():
            if value is not None and not value > 0:
                raise ConfigError(f"{name} of {type(self).__name__} must be more than 0, got {value!r}")
        self._num_classes = num_classes
        self._epochs = epochs
        self._lr = lr
        self._batch_size = batch_size
        self._device = device
        self._verbose = verbose

    def fit(self, *Xs: Tensor, y: Tensor) -> Self:
        """Train on rows, going on from the current weights.

        Args:
            Xs: The inputs of ``forward``, each (n, width).
            y: (n,) class numbers (-100: leave this row out), or values of exactly the shape of the output:
                (n, 1) for a linear regression.

        Returns:
            The estimator.

        Raises:
            ConfigError: Sizes or shapes do not fit, or the labels are no class numbers.
        """
        with own_mode(grad=True):
            _make_trainable(self)
            inputs = [self._cast(x) for x in Xs]
            data = TensorDataset(*_of_one_length([*inputs, self._targets(y)]))
            self.train()
            with torch.random.fork_rng(self._cuda_devices()):
                self._train(data)
        return self

    def predict(self, *Xs: Tensor) -> Tensor:
        """Return the class with the largest output, (n,) int64; without ``num_classes`` the output itself."""
        self.eval()
        with own_mode(grad=False):
            output = self(*(self._cast(x) for x in Xs))
            return output.argmax(dim=-1) if self._num_classes is not None else output

    def _train(self, data: TensorDataset) -> None:
        # Whole batches are drawn by one index; DataLoader's own way fetches row by row.
        sampler = BatchSampler(RandomSampler(data), self._batch_size, drop_last=False)
        loader: Any = DataLoader(data, sampler=sampler, batch_size=None)
        optimizer = torch.optim.Adam(self.parameters(), lr=self._lr)
        bar = tqdm(range(self._epochs), desc=type(self).__name__, disable=not self._verbose)
        for _ in bar:
            for *inputs, target in loader:
                loss = self._loss_fn(self(*inputs), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            bar.set_postfix(loss=f"{float(loss.detach()):.3g}", refresh=False) if self._verbose else None
        if not all(bool(p.isfinite().all()) for p in self.parameters()):
            warnings.warn(
                f"{type(self).__name__} ended with NaN or infinite weights; are all inputs finite?",
                stacklevel=3,
            )

    def _loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        if self._num_classes is None:
            if output.shape != target.shape:
                raise ConfigError(
                    f"the output has shape {tuple(output.shape)}, y has {tuple(target.shape)}; a regression "
                    "needs equal shapes (y.unsqueeze(-1) for one value per row; num_classes= for classes)"
                )
            return functional.mse_loss(output, target)
        if output.shape[:-1] != target.shape or output.shape[-1] != self._num_classes:
            raise ConfigError(
                f"the output has shape {tuple(output.shape)}, y has {tuple(target.shape)}; a "
                f"classification needs outputs (..., {self._num_classes}), one for each class, and y (...)"
            )
        return functional.cross_entropy(output.reshape(-1, self._num_classes), target.reshape(-1))

    def _targets(self, y: Any) -> Tensor:
        y = normal(_tensor(y))
        if self._num_classes is None:
            return self._cast(y)
        if y.is_floating_point() or y.is_complex():
            raise ConfigError(f"class labels are integers from 0 to {self._num_classes - 1}, got y of {y.dtype}")
        y = y.long()
        wrong = y[((y < 0) & (y != IGNORED)) | (y >= self._num_classes)]
        if len(wrong):
            raise ConfigError(
                f"class labels are integers from 0 to {self._num_classes - 1} ({IGNORED} leaves a row out), "
                f"got {wrong[0].item()}; is num_classes what you meant?"
            )
        return y

    def _cast(self, x: Any) -> Tensor:
        x = normal(_tensor(x)).detach()
        parameter = next(self.parameters(), None)
        return x.to(torch.float32 if parameter is None else parameter.dtype)

    def _cuda_devices(self) -> list[int]:
        return sorted({p.get_device() for p in self.parameters() if p.is_cuda})


def _tensor(x: Any) -> Tensor:
    # torch.as_tensor would move tensors to the default device.
    return x if isinstance(x, Tensor) else torch.as_tensor(x)


def _make_trainable(module: nn.Module) -> None:
    """Replace weights that were made under inference mode, which nothing can change any more."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(parameter.clone(), parameter.requires_grad)


def _of_one_length(tensors: list[Tensor]) -> list[Tensor]:
    lengths = [len(t) if t.ndim else 0 for t in tensors]
    if len(set(lengths)) != 1 or not lengths[0]:
        inputs, labels = " and ".join(map(str, lengths[:-1])) or "no", lengths[-1]
        raise ConfigError(
            f"a probe is fitted on as many rows as labels, and at least one: got {inputs} rows and {labels} labels"
        )
    return tensors
