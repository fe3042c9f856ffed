"""The house: what importing costs, who imports whom, what is documented, how large it is."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import jaxtyping
import pytest
import torch

import tdprobe
from shape_checks import shapes_only
from tdprobe import _types, errors

ROOT = Path(__file__).parent.parent
PACKAGE = Path(tdprobe.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(module.name for module in pkgutil.walk_packages(tdprobe.__path__, "tdprobe."))
# Each third party and the one room that opens its door.
DOORS = {
    "transformers": "hf",
    "huggingface_hub": "hf",
    "gguf": "hf",
    "matplotlib": "viz",
    "altair": "viz",
    "vl_convert": "viz",
    "pandas": "tables",
    "xarray": "tables",
    "sklearn": "latent",
    "typer": "cli",
}


def run_python(code: str) -> str:
    """Run ``code`` in a fresh interpreter and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_import_loads_no_optional_or_slow_library():
    code = "import json, sys, tdprobe; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = set(json.loads(run_python(code)))
    assert not loaded & {*DOORS, "jaxtyping", "beartype"}


def test_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", tdprobe.__version__)
    assert importlib.metadata.version("tdprobe") == tdprobe.__version__
    assert f"\nversion: {tdprobe.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{tdprobe.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_public_name_exists_and_is_listed():
    for name in tdprobe.__all__:
        assert getattr(tdprobe, name) is not None
    assert set(tdprobe.__all__) <= set(dir(tdprobe))


def test_unknown_name_suggests_a_close_one():
    with pytest.raises(AttributeError, match="LayerScoring"):
        _ = tdprobe.LayerScorin


def is_described(thing: type | FunctionType) -> bool:
    text = (thing.__doc__ or "").strip()
    # A dataclass without a docstring gets its signature as one.
    return bool(text) and not text.startswith(f"{thing.__name__}(")


@pytest.mark.parametrize("name", MODULES)
def test_every_public_object_has_a_docstring(name: str):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    objects = [(n, getattr(module, n)) for n in exported]
    own = [(n, o) for n, o in objects if inspect.isclass(o) or inspect.isfunction(o)]
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    assert not [n for n, o in own if o.__module__.startswith("tdprobe") and not is_described(o)]


def test_no_name_hides_the_file_that_others_are_described_in():
    # The reference asks for a file by its dotted path, and gets an object of that name where there is one.
    for path in sorted((PACKAGE / "latent").rglob("__init__.py")):
        package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for name in getattr(room := importlib.import_module(package), "__all__", ()):
            file = getattr(getattr(room, name), "__module__", "")
            if file.rpartition(".")[0] == package:
                assert file.endswith(f".{name}") or inspect.ismodule(getattr(room, file.rpartition(".")[2])), name


def test_every_folder_with_code_is_a_package():
    # import-linter and the wheel pass over a folder that is none, without a word.
    assert not {path.parent for path in SOURCES if not (path.parent / "__init__.py").exists()}


def test_rooms_import_one_way():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def imported_by_name(tree: ast.AST) -> set[str]:
    """Return the packages that a file imports through a string, which import-linter cannot see."""
    names = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        if called in {"import_module", "__import__", "require_extra"} and isinstance(node.args[0].value, str):
            names.add(node.args[0].value.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_by_name_use_the_one_door(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported_by_name(ast.parse(path.read_text(encoding="utf-8")))
    wrong = {name for name in names if DOORS.get(name, room) != room}
    assert not wrong, f"{room} opens the door of {wrong}"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function, its docstring left out."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(path: Path):
    source = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    lines = {n.name: body_lines(n) for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert len(source.splitlines()) <= 250
    assert not {name: count for name, count in lines.items() if count > 40}


def test_shapes_are_checked_while_tests_run():
    assert _types.Float is jaxtyping.Float
    assert hasattr(errors.closest, "__wrapped__"), "tdprobe was imported before jaxtyping's hook was set"


def test_shape_check_refuses_wrong_shapes_and_leaves_plain_types_alone():
    @jaxtyping.jaxtyped(typechecker=shapes_only)
    def product(x: jaxtyping.Float[torch.Tensor, "n d"], y: jaxtyping.Float[torch.Tensor, "d"], note: str):
        return x @ y

    assert product(torch.ones(2, 3), torch.ones(3), 7).tolist() == [3.0, 3.0]
    with pytest.raises(jaxtyping.TypeCheckError, match="'y'"):
        product(torch.ones(3, 2), torch.ones(3), "")
