"""Add noise at named modules while a model runs, and bound how much each still tells about what came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from tdprobe.contexts import Site
from tdprobe.errors import ConfigError
from tdprobe.hooks import Hook, replace_first_tensor
from tdprobe.hooks.gate import in_backward
from tdprobe.latent.information.noise import NoiseLevels
from tdprobe.latent.information.noised_context import NoisedContext
from tdprobe.latent.information.noised_estimator import check_noise
from tdprobe.latent.layer_stream import LayerStreaming, layer_value
from tdprobe.latent.scoring import ScoredModule
from tdprobe.latent.scoring_options import DEFAULT_MAX_NORM
from tdprobe.stream.outliers import check_max_norm


class NoisedModule(ScoredModule):
    """A model with noise at some of its modules."""

    def calibrating(self) -> AbstractContextManager[None]:
        """Learn standard deviations from the passes in a block; see :meth:`NoisedContext.calibrating`."""
        return self.hooking_context.calibrating()


class NoisedInformation(LayerStreaming):
    r"""Add Gaussian noise to what modules return, and bound how much each still tells about what came in.

    .. math:: Y = h + \text{noise} \cdot \sigma \cdot \epsilon, \qquad
        \text{lower} \le I(h; Y) \le \text{upper} \le \log n

    :math:`\sigma` is the standard deviation of each feature of that module over the tokens of a calibration, since
    features differ a hundredfold in size between layers. The model goes on with Y, so that its output shows what the
    noise costs. h is the value that arrived, one of n rows seen: after noise at an earlier module, what the upper
    bound says about the text holds, and the lower one is about h alone. To measure layers of the undisturbed model,
    score ``NoisedInformationEstimator`` with `LayerScoring`.

    Noise is drawn from ``seed``, the place of the module, and the number of the pass since the block was entered; the
    global random state is left alone. It is added in float32 at least, out of place, to the tokens that count only,
    and gradients flow through it. With ``noise=0`` the model computes bit for bit what it computes without hooks.

    Args:
        key_pattern: Regular expression matched from the start of the dotted module name.
        noise: Standard deviation of the noise in units of each feature's own.
        seed: Of the noise.
        relative: Names start at the user's model; ``False`` starts them at the wrapper.
        stds: (features,) by module name, in place of a calibration, such as ``context.stds`` of another one.
        tokens: Which tokens get noise and count; see :class:`tdprobe.stream.tokens.TokenClause`.
        skip_first: Real tokens at the start of each row that are left alone.
        bank_size: Rows n to tell apart; their pairs are compared layer by layer.
        max_norm: Rows longer than this many median row lengths in any layer are left out of calibration and scores;
            ``None`` keeps them.
        required: A pattern that matches nothing, or layers that never run, are errors.
        name: What the table calls the model.

    Raises:
        ConfigError: An argument is not allowed; on enter also for a pattern that matches nothing.

    Example:
        >>> import torch
        >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(64, 8)
        >>> with NoisedInformation(r"\d", noise=0.5).prepare(model) as hooked:
        ...     with hooked.calibrating():
        ...         out = hooked(x)
        ...     noisy = hooked(x)
        >>> table = hooked.scores()
        >>> bool((table.matrix("information_lower") <= table.matrix("information_upper")).all())
        True

    References:
        Kolchinsky, Tracey 2017, Estimating mixture entropy with pairwise distances.
    """

    _hooking_context_class = NoisedContext
    _hooked_module_class = NoisedModule

    def __init__(
        self,
        key_pattern: str,
        noise: float = 1.0,
        seed: int = 0,
        *,
        relative: bool = True,
        stds: Mapping[str, Tensor] | None = None,
        tokens: Any = "all",
        skip_first: int = 1,
        bank_size: int = 1024,
        max_norm: float | None = DEFAULT_MAX_NORM,
        required: bool = True,
        name: str = "model",
    ) -> None:
        super().__init__(key_pattern, relative=relative, tokens=tokens, skip_first=skip_first, required=required)
        check_noise(noise)
        check_max_norm(max_norm)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seed is an int, got {seed!r}")
        if isinstance(bank_size, bool) or not isinstance(bank_size, int) or bank_size < 2:
            raise ConfigError(f"bank_size counts rows to tell apart (an int of at least 2), got {bank_size!r}")
        if isinstance(tokens, str) and tokens == "mean":
            raise ConfigError("tokens='mean' is no place to add noise to; 'all' is every real token")
        if stds is not None:
            NoiseLevels.given(stds, noise)
        self.noise, self.seed, self.stds = noise, seed, stds
        self.bank_size, self.max_norm, self.name = bank_size, max_norm, name

    def _site_hook(self, context: NoisedContext, module: nn.Module, site: Site) -> Hook:
        return Hook(module, "fwd", _noising_hook(context, site), edits=True, order=context.gate.number)


def _noising_hook(context: NoisedContext, site: Site) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if in_backward():
            acts, take = context.gate.admits_backward(), context.rerun_of
        else:
            # Outside of a call of the prepared model nothing is known about padding, so nothing is done.
            acts, take = context.tracker.call is not None and context.gate.admits(), context.run_of
        new = take(site, layer_value(site.name, output)) if acts else None
        return None if new is None else replace_first_tensor(output, new)

    return hook
