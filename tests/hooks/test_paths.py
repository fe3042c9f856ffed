"""Module paths: what they mean, and that nothing in them ever runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tdprobe.errors import TdprobeError
from tdprobe.hooks.paths import parse_path, resolve_path


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(2, 2)
        self.heads = nn.ModuleDict({"a": nn.Linear(1, 1), "b-c": nn.Linear(1, 1)})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.add_module("odd/name", nn.Sequential(nn.Linear(1, 1), nn.Tanh()))
        self.add_module("1x1", nn.Linear(1, 1))
        self.tied = self.blocks[2].attn
        self.same = self.get_submodule("1x1")
        self.plain = [nn.Linear(1, 1)]
        self.scale = nn.Parameter(torch.ones(1))

    @property
    def trap(self) -> nn.Module:
        raise AssertionError("a path ran a property")


MODEL = Model()
BLOCKS = MODEL.blocks


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("", MODEL),
        ("blocks", BLOCKS),
        ("blocks.0", BLOCKS[0]),
        ("blocks[0]", BLOCKS[0]),
        ("blocks[-1].attn", BLOCKS[3].attn),
        ("blocks[ -2 ].attn", BLOCKS[2].attn),
        ("blocks.1.heads.a", BLOCKS[1].heads["a"]),
        ("blocks[1].heads['a']", BLOCKS[1].heads["a"]),
        ('blocks[1].heads["b-c"]', BLOCKS[1].heads["b-c"]),
        ("blocks[1].heads.<b-c>", BLOCKS[1].heads["b-c"]),
        ("<odd/name>[0]", MODEL.get_submodule("odd/name")[0]),
        ("<odd/name>.1", MODEL.get_submodule("odd/name")[1]),
        ("1x1", MODEL.get_submodule("1x1")),
        ("<1x1>", MODEL.get_submodule("1x1")),
        ("tied", BLOCKS[2].attn),
        ("same", MODEL.get_submodule("1x1")),
    ],
)
def test_a_path_leads_to_one_module_under_its_own_name(path: str, module: nn.Module) -> None:
    found = resolve_path(MODEL, path)
    assert list(found) == [path] and found[path] is module


@pytest.mark.parametrize("path", ["0", "[0]", "[-3]"])
def test_a_bare_leading_number_works(path: str) -> None:
    chain = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Tanh())
    assert resolve_path(chain, path)[path] is chain[0]


@pytest.mark.parametrize(
    ("path", "places"),
    [("blocks[1:3]", [1, 2]), ("blocks[:]", [0, 1, 2, 3]), ("blocks[-2:]", [2, 3]), ("blocks[::-2]", [3, 1])],
)
def test_a_slice_leads_to_several_modules_each_under_its_index(path: str, places: list[int]) -> None:
    found = resolve_path(MODEL, path + ".attn")
    assert list(found) == [f"blocks[{place}].attn" for place in places]
    assert [found[name] is BLOCKS[place].attn for name, place in zip(found, places, strict=True)] == [True] * len(
        places
    )
    assert all(resolve_path(MODEL, name)[name] is module for name, module in found.items())


@pytest.mark.parametrize(
    "path",
    [
        "blocks[0].attn.reset_parameters()",
        "blocks.__class__.__init__.__globals__",
        "blocks[0 if True else 1]",
        "blocks[len('a')]",
        "blocks[0].attn.weight.zero_()",
        "().__class__",
        "blocks[0]; import os",
        "lambda: 0",
        "blocks..attn",
        ".blocks",
        "blocks.",
        "blocks[",
        "blocks[0",
        "<odd/name",
        "blocks[0]attn",
        "blocks[1.5]",
        "heads['a]",
        "blocks 0",
        3,
        None,
    ],
)
def test_what_is_no_path_is_refused_with_the_grammar(path: Any) -> None:
    before = torch.nn.utils.parameters_to_vector(MODEL.parameters()).clone()
    with pytest.raises(ValueError, match=r"blocks\[1:3\]|no module|leads") as caught:
        resolve_path(MODEL, path)
    assert isinstance(caught.value, TdprobeError)
    assert torch.equal(torch.nn.utils.parameters_to_vector(MODEL.parameters()), before)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("block[0]", r"'block\[0\]' leads nowhere.*'blocks'"),
        ("blocks[0].atn", r"'blocks\[0\]' has no atn; there is 'attn'"),
        ("blocks[0].heads['c']", r"has no 'c'"),
        ("blocks[7]", r"asks for \[7\] of 'blocks', which has 4 modules"),
        ("blocks[-5]", "which has 4 modules"),
        ("blocks[4:]", "takes no module"),
        ("blocks[0].attn[0]", "is a Linear, which has no numbered modules"),
        ("scale", "leads nowhere"),
        ("plain", "leads to a list, which is no module"),
        ("trap", "leads nowhere"),
        ("forward", "leads nowhere"),
        ("training", "leads to a bool"),
    ],
)
def test_a_path_that_leads_nowhere_names_close_ones(path: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        resolve_path(MODEL, path)


def test_a_path_goes_through_a_compiled_layer() -> None:
    model = nn.Sequential(torch.compile(Block()), nn.Linear(1, 1))
    assert resolve_path(model, "[0].attn")["[0].attn"] is model[0]._orig_mod.attn
    assert resolve_path(model, "[0]")["[0]"] is model[0]


@given(st.recursive(st.just(None), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8))
def test_every_module_has_its_dotted_name_and_its_indices_as_paths(shape: Any) -> None:
    def build(part: Any) -> nn.Module:
        return nn.Identity() if part is None else nn.Sequential(*map(build, part))

    root = build(shape)
    for name, module in root.named_modules():
        indexed = "".join(f"[{place}]" for place in name.split(".") if place)
        assert resolve_path(root, name)[name] is module
        assert resolve_path(root, indexed)[indexed] is module


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        steps = parse_path(text)
    except ValueError as error:
        assert text in str(error)
    else:
        assert bool(steps) == bool(text)
