"""Names that are imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

INIT = """
from tdprobe._lazy import lazy
__getattr__, __dir__, __all__ = lazy(__name__, __file__)
plain = 1
"""
STUB = """
from lazy_sample import broken as broken, shapes as shapes
from lazy_sample.broken import Never as Never
from lazy_sample.shapes import Circle as Circle
from lazy_sample.shapes import area as area
from lazy_sample.shapes_too import Moved as Moved
plain: int
"""


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "lazy_sample"
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT, encoding="utf-8")
    (folder / "__init__.pyi").write_text(STUB, encoding="utf-8")
    (folder / "shapes.py").write_text("class Circle: pass\ndef area(r): return 3 * r * r\n", encoding="utf-8")
    (folder / "broken.py").write_text("import no_such_package_anywhere\n", encoding="utf-8")
    (folder / "shapes_too.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("lazy_sample")
    for name in [name for name in sys.modules if name.startswith("lazy_sample")]:
        del sys.modules[name]


def test_nothing_is_imported_before_a_name_is_used(sample: ModuleType) -> None:
    assert "lazy_sample.shapes" not in sys.modules and "Circle" not in vars(sample)
    assert sample.area(2) == 12
    assert "lazy_sample.shapes" in sys.modules
    assert vars(sample)["area"] is sample.shapes.area and "Circle" not in vars(sample)


def test_a_name_is_one_object_however_it_is_reached(sample: ModuleType) -> None:
    from lazy_sample import Circle
    from lazy_sample.shapes import Circle as Direct

    assert Circle is Direct is sample.Circle


def test_submodules_are_imported_on_use(sample: ModuleType) -> None:
    assert sample.shapes is importlib.import_module("lazy_sample.shapes")


def test_names_are_listed_without_importing_them(sample: ModuleType) -> None:
    assert {"Circle", "area", "Never", "shapes", "plain"} <= set(dir(sample)) and dir(sample) == sorted(dir(sample))
    assert sample.__all__ == ["Circle", "Moved", "Never", "area"]
    assert "lazy_sample.shapes" not in sys.modules


def test_unknown_names_are_attribute_errors_with_close_ones(sample: ModuleType) -> None:
    with pytest.raises(AttributeError, match="module 'lazy_sample': unknown name 'Cirle'; did you mean 'Circle'"):
        _ = sample.Cirle
    assert not hasattr(sample, "__wrapped__") and getattr(sample, "nothing", None) is None
    with pytest.raises(ImportError, match="cannot import name 'Square'"):
        from lazy_sample import Square  # noqa: F401


@pytest.mark.parametrize("name", ["Never", "broken"])
def test_an_import_that_fails_says_what_is_missing(sample: ModuleType, name: str) -> None:
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
            getattr(sample, name)


def test_a_name_that_its_module_lacks_is_an_attribute_error(sample: ModuleType) -> None:
    with pytest.raises(AttributeError, match="Moved"):
        _ = sample.Moved
