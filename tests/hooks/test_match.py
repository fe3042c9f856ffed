"""From patterns to modules."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tdprobe.hooks import match_modules, named_submodules
from tdprobe.hooks.match import block_pattern, walk


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(12)]),
            "norm": nn.LayerNorm(2),
        }
    )


NAMES = [f"layers.{i}{part}" for i in range(12) for part in ("", ".0", ".1")] + ["norm"]


def test_walking_finds_what_named_modules_finds() -> None:
    shared = nn.Linear(2, 2)
    root = nn.ModuleDict({"first": model(), "a": nn.Sequential(shared, nn.Sequential(shared)), "b": shared})
    root.register_module("nothing", None)
    assert list(walk(root)) == list(root.named_modules(remove_duplicate=False))


def test_lists_and_the_root_are_never_hooked() -> None:
    assert [name for name, _ in named_submodules(model())] == NAMES
    assert list(match_modules(model(), "")) == NAMES


@given(st.sampled_from(["layers", r"layers\.1", r"layers\.\d+$", "norm", r".*\.0", "(layers|norm)", "n", r".*\.1$"]))
def test_patterns_mean_what_re_match_means(pattern: str) -> None:
    assert list(match_modules(model(), pattern)) == [name for name in NAMES if re.compile(pattern).match(name)]


def test_a_prefix_goes_before_every_name() -> None:
    assert list(match_modules(model(), r"td_module\.module\.norm", prefix="td_module.module")) == [
        "td_module.module.norm"
    ]


def test_with_a_prefix_the_model_itself_has_a_name() -> None:
    norm = nn.Sequential(nn.LayerNorm(2))
    assert match_modules(norm, "td", prefix="td") == {"td": norm, "td.0": norm[0]}
    assert match_modules(norm, "$", required=False) == {}


def test_a_module_with_two_names_is_found_once_under_either() -> None:
    shared = nn.Linear(2, 2)
    tied = nn.ModuleDict({"first": shared, "second": shared})
    assert match_modules(tied, "") == {"first": shared}
    assert match_modules(tied, "second") == {"second": shared}


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        (r"layer\.3$", "'layers.3'"),
        (r"layers\.\d+\.mlp", "'layers."),
        ("nrom", "'norm'"),
        (r"Norm", "'norm'"),
        ("zzzzzz", "'layers.0'"),
    ],
)
def test_nothing_matched_quotes_the_pattern_as_typed_and_close_names(pattern: str, near: str) -> None:
    with pytest.raises(ValueError) as caught:
        match_modules(model(), pattern)
    assert f"'{pattern}' matches no module of ModuleDict" in str(caught.value)
    assert near in str(caught.value) and "37 modules" in str(caught.value)
    assert match_modules(model(), pattern, required=False) == {}


@pytest.mark.parametrize("pattern", [None, 3, ["layers"], re.compile("layers")])
def test_a_pattern_is_a_string(pattern: Any) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        match_modules(model(), pattern)


def test_a_model_without_parts_says_so() -> None:
    with pytest.raises(ValueError, match=r"Linear has no submodule to hook, so the pattern 'a\\.b'"):
        match_modules(nn.Linear(2, 2), r"a\.b")


def test_blocks_are_the_largest_list_of_equal_children() -> None:
    pattern = block_pattern(model())
    assert list(match_modules(model(), pattern)) == [f"layers.{i}" for i in range(12)]
    with pytest.raises(ValueError, match="no list of equal blocks"):
        block_pattern(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
