"""From paths to modules: a small grammar, read by a parser and never run as code."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from tdprobe.errors import ConfigError, closest

GRAMMAR = (
    "a path is made of attributes (blocks.attn), numbers (blocks.0), indices (blocks[-1]), slices (blocks[1:3]), "
    "keys (heads['a']) and raw names (<odd/name>)"
)

_TOKEN = re.compile(
    r"""\.?(?:
        <(?P<raw>[^<>]+)>
      | (?P<name>\w+)
      )
      | \[\s*(?:
        (?P<index>-?\d+)
      | (?P<slice>-?\d*\s*:\s*-?\d*(?:\s*:\s*-?\d*)?)
      | (?P<quote>['"])(?P<key>[^'"]+)(?P=quote)
      )\s*\]""",
    re.VERBOSE,
)

Step = tuple[str, Any]


def parse_path(path: str) -> list[Step]:
    """Split a module path into steps.

    Returns:
        Pairs of kind (``"attribute"``, ``"index"``, ``"slice"`` or ``"key"``) and value.

    Raises:
        ConfigError: The path does not follow the grammar.

    Example:
        >>> parse_path("blocks[-1].attn")
        [('attribute', 'blocks'), ('index', -1), ('attribute', 'attn')]
    """
    if not isinstance(path, str):
        raise ConfigError(f"a module path is a str, got {path!r}; {GRAMMAR}")
    steps: list[Step] = []
    at = 0
    while at < len(path):
        found = _TOKEN.match(path, at)
        if found is None or (at == 0 and path[0] == "."):
            raise ConfigError(f"cannot read the module path '{path}' from '{path[at:]}' on; {GRAMMAR}")
        steps.append(_step(found))
        at = found.end()
        if at < len(path) and path[at] not in ".[<":
            raise ConfigError(f"cannot read the module path '{path}' from '{path[at:]}' on; {GRAMMAR}")
    return steps


def resolve_path(root: nn.Module, path: str) -> dict[str, nn.Module]:
    """Find the module, or with a slice the modules, that a path leads to.

    Args:
        root: Where the path starts; the empty path is the root itself.
        path: See :func:`parse_path`.

    Returns:
        Modules by path. Without a slice there is one, under the path as it was written; a slice gives one for
        each element, with the slice replaced by its index.

    Raises:
        ConfigError: The path is malformed, leads nowhere, or to something that is no module; close names are shown.

    Example:
        >>> list(resolve_path(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Tanh()), "[1:]"))
        ['[1]', '[2]']
    """
    steps = parse_path(path)
    found: list[tuple[str, Any]] = [("", root)]
    for step in steps:
        found = [reached for lead, module in found for reached in _follow(module, lead, step, path)]
    for _, module in found:
        if not isinstance(module, nn.Module):
            raise ConfigError(f"the module path '{path}' leads to a {type(module).__name__}, which is no module")
    if not any(kind == "slice" for kind, _ in steps):
        return {path: found[0][1]}
    if not found:
        raise ConfigError(f"the slice in the module path '{path}' takes no module")
    return dict(found)


def _step(found: re.Match[str]) -> Step:
    groups = found.groupdict()
    if groups["index"] is not None:
        return "index", int(groups["index"])
    if groups["slice"] is not None:
        parts = [int(part) if part.strip() else None for part in groups["slice"].split(":")]
        return "slice", slice(*parts)
    if groups["key"] is not None:
        return "key", groups["key"]
    return "attribute", groups["raw"] or groups["name"]


def _follow(module: Any, lead: str, step: Step, path: str) -> list[tuple[str, Any]]:
    kind, value = step
    if kind == "attribute":
        return [(_joined(lead, value), _attribute(module, value, lead, path))]
    if kind == "key":
        module = _inside(module)
        if not isinstance(module, nn.ModuleDict) or value not in module:
            raise ConfigError(
                _nowhere(path, lead, repr(value), list(module) if isinstance(module, nn.ModuleDict) else [])
            )
        return [(f"{lead}[{value!r}]", module[value])]
    module = _inside(module)
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        raise ConfigError(
            f"'{lead or 'the root'}' in the module path '{path}' is a {type(module).__name__}, which has no numbered "
            "modules"
        )
    places = range(len(module))
    if kind == "slice":
        return [(f"{lead}[{place}]", module[place]) for place in places[value]]
    if value not in places and -value - 1 not in places:
        raise ConfigError(
            f"the module path '{path}' asks for [{value}] of '{lead or 'the root'}', which has {len(module)} modules"
        )
    return [(f"{lead}[{places[value]}]", module[value])]


def _attribute(module: Any, name: str, lead: str, path: str) -> Any:
    # Not named_children, which leaves out the second name of a tied module; not getattr, which runs properties.
    children = module._modules if isinstance(module, nn.Module) else {}
    if children.get(name) is not None:
        return children[name]
    found = vars(module).get(name) if isinstance(module, nn.Module) else None
    if found is not None:
        return found
    if _inside(module) is not module:
        return _attribute(_inside(module), name, lead, path)
    raise ConfigError(_nowhere(path, lead, name, [child for child, found in children.items() if found is not None]))


def _inside(module: Any) -> Any:
    """Return what torch.compile wraps: its wrapper is no part of the path that users know."""
    inner = module._modules.get("_orig_mod") if isinstance(module, nn.Module) else None
    return module if inner is None else inner


def _joined(lead: str, name: str) -> str:
    part = name if re.fullmatch(r"\w+", name) else f"<{name}>"
    return f"{lead}.{part}" if lead else part


def _nowhere(path: str, lead: str, name: str, known: list[str]) -> str:
    near = closest(name.strip("'"), known) or known[:5]
    hint = f"; there is {', '.join(map(repr, near))}" if near else ""
    return f"the module path '{path}' leads nowhere: '{lead or 'the root'}' has no {name}{hint}. ({GRAMMAR})"
