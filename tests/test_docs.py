"""Every snippet of the README and the documentation runs, page by page, and prints what the page says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from tdprobe import registry

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Return line, language and text of every fenced block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start()) + 1, found[1], found[2]) for found in FENCE.finditer(text)]


def assert_same_output(printed: str, shown: str, where: str) -> None:
    """Words must be equal; numbers may differ as far as another processor or version of torch may move them."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), f"{where} prints:\n{printed}"
    ours, theirs = ([float(number) for number in NUMBER.findall(text)] for text in (printed, shown))
    assert ours == pytest.approx(theirs, rel=0.05, abs=0.03), f"{where} prints:\n{printed}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text("utf-8")], ids=lambda page: page.name
)
def test_snippets_run_in_order_and_print_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    registry.names()  # loads what is registered once for all, before the page adds to it
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    found, names = blocks(page), {"__name__": "docs"}
    for place, (line, language, text) in enumerate(found):
        if language != "python":
            continue
        # Blank lines in front let a traceback name the line of the page.
        code = compile("\n" * line + text, str(page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)  # noqa: S102
        follower = found[place + 1 : place + 2]
        if follower and follower[0][1] == "text":
            assert_same_output(printed.getvalue(), follower[0][2], f"{page.name}, line {line},")


def test_every_page_is_in_a_table_of_contents() -> None:
    texts = {page.stem: page.read_text(encoding="utf-8") for page in PAGES[1:]}
    trees = re.findall(r"^```{toctree}\n(.*?)^```$", "\n".join(texts.values()), re.MULTILINE | re.DOTALL)
    assert texts.keys() - {"index"} <= set("\n".join(trees).split())
