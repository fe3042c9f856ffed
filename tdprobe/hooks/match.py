"""From patterns to modules."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from tdprobe.errors import ConfigError, closest


def runs(module: nn.Module) -> bool:
    """Tell whether a module has a forward of its own, which containers such as ``ModuleList`` lack."""
    return type(module).forward is not nn.Module.forward


def walk(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """List what ``root.named_modules(remove_duplicate=False)`` yields; every enter pays for it, hence no generators."""
    found: list[tuple[str, nn.Module]] = [("", root)]

    def visit(lead: str, module: nn.Module) -> None:
        for part, child in module._modules.items():
            if child is not None:
                found.append((lead + part, child))
                if child._modules:
                    visit(f"{lead}{part}.", child)

    visit("", root)
    return found


def named_submodules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every submodule that can fire, under every name that it has; the root itself is not among them."""
    for name, module in walk(root):
        if name and runs(module):
            yield name, module


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a module pattern.

    Raises:
        re.error: The pattern is no regular expression.
        ConfigError: It is no string.
    """
    if not isinstance(pattern, str):
        raise ConfigError(
            f"a module pattern is a regular expression (str), got {pattern!r} of type {type(pattern).__name__}"
        )
    return re.compile(pattern)


def match_modules(root: nn.Module, pattern: str, *, prefix: str = "", required: bool = True) -> dict[str, nn.Module]:
    """Find the modules whose dotted name the pattern matches from its start.

    Args:
        root: The model whose ``named_modules`` give the names.
        pattern: Regular expression for ``re.match``: anchored at the start of the name, open at its end.
        prefix: Put before every name, for names that start above the model; it is then the name of the model itself,
            which has none otherwise.
        required: Refuse a pattern that matches nothing.

    Returns:
        Modules by name in definition order. A module that has several matching names is there once, under the first.

    Raises:
        ConfigError: Nothing matches and ``required``; the closest names are shown.
    """
    matches = compile_pattern(pattern).match
    lead = f"{prefix}." if prefix else ""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in walk(root):
        full = lead + name if name else prefix
        if full and matches(full) and id(module) not in seen and runs(module):
            seen.add(id(module))
            found[full] = module
    if required and not found:
        raise ConfigError(_nothing_matches(pattern, [lead + name for name, _ in named_submodules(root)], root))
    return found


def _nothing_matches(pattern: str, names: list[str], root: nn.Module) -> str:
    if not names:
        return f"{type(root).__name__} has no submodule to hook, so the pattern '{pattern}' cannot match one"
    plain = re.sub(
        r"\\d[+*]?|\[[^\]]*\][+*]?|\(\?:|[()^$?]",
        lambda m: "0" if "d" in m[0] or "[" in m[0] else "",
        pattern,
    )
    near = closest(plain.replace("\\", "").replace(".*", ""), names) or names[:3]
    return (
        f"the pattern '{pattern}' matches no module of {type(root).__name__}; close names: "
        f"{', '.join(map(repr, near))} ({len(names)} modules in all). Patterns are regular expressions matched "
        "from the start of the dotted name; `tdprobe layers MODEL` lists the names, required=False keeps silence."
    )


def block_pattern(root: nn.Module) -> str:
    r"""Return a pattern for the repeated blocks of a model, such as its decoder layers.

    The blocks are the children of the container that holds the largest share of the parameters among those whose
    children are all of one class.

    Raises:
        ConfigError: The model has no such container.

    Example:
        >>> block_pattern(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}))
        'layers\\.\\d+$'
    """
    sizes: dict[str, int] = {}
    for name, module in root.named_modules():
        children = list(module.children())
        if (
            isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(children) > 1
            and len({type(c) for c in children}) == 1
        ):
            sizes[name] = sum(p.numel() for p in module.parameters())
    if not sizes:
        names = ", ".join(repr(name) for name, _ in root.named_children())
        raise ConfigError(
            f"{type(root).__name__} has no list of equal blocks to compare; "
            f"name the layers by a pattern (children: {names})"
        )
    name = max(sizes, key=lambda name: sizes[name])
    return re.escape(f"{name}." if name else "") + r"\d+$"
