"""List what can be hooked in a model, with the shapes that come out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdprobe.compare.checkpoints import evaluating
from tdprobe.errors import ConfigError
from tdprobe.hooks import Hook, MultiHookHandle, first_tensor, match_modules, named_submodules
from tdprobe.modules import input_device, is_hugging_face

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class LayerInfo:
    """One hookable module, or several that differ in numbers only.

    Attributes:
        name: Dotted name; a run of numbers shows as ``{0..29}``, a choice as ``{0,2,4}``.
        pattern: What to give as ``key_pattern`` to hook exactly these.
        module: Class name.
        shape: Output shape with ``b`` for batch and ``t`` for tokens; empty if the module did not run.
        count: How many modules the row stands for.
    """

    name: str
    pattern: str
    module: str
    shape: str
    count: int


def list_layers(
    model: nn.Module, run: Callable[[int, int], Any] | None = None, *, collapse: bool = True
) -> list[LayerInfo]:
    r"""List the modules of a model that can be hooked.

    Args:
        model: The model; it runs in eval mode and without gradients.
        run: Called twice with (batch, tokens); runs the model on an input of that size. Axes that follow the
            sizes are shown by name. Models of transformers that take token ids need none.
        collapse: Put modules that differ in numbers only into one row.

    Raises:
        ConfigError: There is no ``run``, and the model does not run on token ids.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> list_layers(model, lambda b, t: model(torch.ones(b, t, 4)))
        [LayerInfo(name='{0..1}', pattern='\\d+$', module='Linear', shape='(b, t, 4)', count=2)]
    """
    run = partial(_run_on_token_ids, model) if run is None else run
    # A module with several names is hooked once, under the first.
    modules = match_modules(model, "", required=False)
    with evaluating(model), torch.no_grad():
        small, large = _shapes(modules, lambda: run(2, 5)), _shapes(modules, lambda: run(3, 7))
    shapes = {name: _symbolic(small.get(name), large.get(name)) for name in modules}
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, module in modules.items():
        key = _NUMBER.sub("#", name) if collapse else name
        groups.setdefault((key, type(module).__name__, shapes[name]), []).append(name)
    every = [name for name, _ in named_submodules(model)]
    return [
        LayerInfo(_shown(names), _pattern(names, every), kind, shape, len(names))
        for (_, kind, shape), names in groups.items()
    ]


def _run_on_token_ids(model: nn.Module, batch: int, tokens: int) -> None:
    name, takes = type(model).__name__, getattr(model, "main_input_name", None)
    how = "list_layers(model, run) takes a run(b, t) that calls the model on an input of that size"
    if not is_hugging_face(model):
        raise ConfigError(f"{name} is no model of transformers, so what it takes cannot be told; {how}")
    device = input_device(model)
    ids = torch.ones(batch, tokens, dtype=torch.long, device=device)
    is_double = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    try:
        model(input_ids=ids, **({"decoder_input_ids": ids} if is_double else {}))
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"{name}, whose main input is {takes!r}, did not run on token ids: {said}; {how}") from error


def _shapes(modules: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = first_tensor(output)
            if isinstance(value, Tensor):
                found[name] = tuple(value.shape)

        return hook

    handle = MultiHookHandle([Hook(module, "fwd", watch(name)) for name, module in modules.items()])
    try:
        run()
    finally:
        handle.remove()
    return found


def _symbolic(small: tuple[int, ...] | None, large: tuple[int, ...] | None) -> str:
    if small is None or large is None or len(small) != len(large):
        return ""
    names = {(2, 3): "b", (5, 7): "t", (10, 21): "b*t"}
    axes = [str(a) if a == b else names.get((a, b), f"{a}|{b}") for a, b in zip(small, large, strict=True)]
    return f"({', '.join(axes)})"


def _columns(names: list[str]) -> list[list[str]]:
    """Return the different numbers in each place where the names have one, in order of value."""
    places = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    return [sorted(set(numbers), key=int) for numbers in places]


def _filled(name: str, fills: list[str]) -> str:
    """Put one text in the place of each number of a name, and escape the rest for a regular expression."""
    parts = [re.escape(part) for part in _NUMBER.split(name)]
    return parts[0] + "".join(fill + part for fill, part in zip(fills, parts[1:], strict=True))


def _shown(names: list[str]) -> str:
    fills = iter([_run(numbers) for numbers in _columns(names)])
    return _NUMBER.sub(lambda _: next(fills), names[0])


def _run(numbers: list[str]) -> str:
    low, high = int(numbers[0]), int(numbers[-1])
    if len(numbers) == 1:
        return numbers[0]
    return f"{{{low}..{high}}}" if high - low + 1 == len(numbers) else f"{{{','.join(numbers)}}}"


def _pattern(names: list[str], every: list[str]) -> str:
    """Return the plainest pattern that matches exactly these names."""
    if len(names) == 1:
        return re.escape(names[0]) + "$"
    columns = _columns(names)
    plain = [r"\d+" if len(numbers) > 1 else numbers[0] for numbers in columns]
    choice = [numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})" for numbers in columns]
    for fills in (plain, choice):
        pattern = _filled(names[0], fills) + "$"
        if [name for name in every if re.match(pattern, name)] == names:
            return pattern
    return f"(?:{'|'.join(map(re.escape, names))})$"
