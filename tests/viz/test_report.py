"""Tests of the HTML report, in the text and in headless Chromium."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from tdprobe.errors import ConfigError, MissingExtraError
from tdprobe.tables import ScoreBlock, ScoreTable

pytest.importorskip("altair", reason="needs the extra 'report'")
pytest.importorskip("vl_convert", reason="needs the extra 'report'")

VOID = {"meta", "link", "br", "img"}
EVIL = "</script><img src=x onerror=alert(1)>"


def sample(count, checkpoints=("base", "tuned"), estimators=("cka", "distance"), names="model.layers.{}"):
    """Return scores of every pair of checkpoints that fall off from the diagonal, and a layer estimator."""
    random = np.random.default_rng(0)
    layers = tuple(names.format(i) for i in range(count))
    depth = np.abs(np.arange(count)[:, None] - np.arange(count))
    blocks = []
    for estimator in estimators:
        for i, a in enumerate(checkpoints):
            for b in checkpoints[i:]:
                values = np.exp(-depth / 8) * random.uniform(0.8, 1.0, depth.shape)
                blocks.append(ScoreBlock(estimator, a, b, layers, layers, values, 64))
    blocks += [ScoreBlock("twonn", a, a, layers, None, random.uniform(5, 9, count), 64) for a in checkpoints]
    return ScoreTable(blocks, {"data": "corpus.txt", "options": {"tokens": "last"}})


class Page(HTMLParser):
    """Collect what a page would load, its texts, and check that each tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.texts = [], [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def text(self, tag, name=None):
        """Join the texts inside the elements of one kind."""
        return "".join(self.texts.get((tag, name), []))


def test_page_is_whole_names_what_was_run_and_loads_nothing(tmp_path):
    table = sample(3)
    path = table.report(tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    assert page.tags[0] == ("html", {"lang": "en"})
    assert page.text("title") == "Layer scores: base, tuned"
    assert set(page.loads) == {"data:,", "#"}
    policy = [attrs["content"] for tag, attrs in page.tags if "Content-Security-Policy" in attrs.values()]
    assert policy[0].startswith("default-src 'none';")
    cells = page.texts[("td", None)]
    assert {"corpus.txt", "last"} <= set(cells)
    assert f"{table.matrix('cka', 'base', 'tuned')[1, 2]:.4g}" in cells
    note = page.text("p")
    assert all(f"{name} " in note for name in ("python", "torch", "tdprobe", "altair"))
    assert ScoreTable.from_json(page.text("script", "scores")) == table


def test_names_cannot_break_out_of_the_page(tmp_path):
    table = sample(2, checkpoints=(EVIL, "b"), estimators=(EVIL,), names="{}" + EVIL)
    page = Page(table.report(tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    assert "img" not in [tag for tag, _ in page.tags]
    assert EVIL in page.text("title")
    assert json.loads(page.text("script", "heat-spec"))["datasets"]["records"][0]["estimator"] == EVIL


def test_page_of_many_scores_stays_below_ten_megabytes(tmp_path):
    table = sample(80, checkpoints=("a", "b", "c"), estimators=("cka", "rsa", "cca", "distance"))
    assert table.report(tmp_path / "report.html").stat().st_size < 10_000_000


@pytest.mark.parametrize("kind", ["nothing", "layers", "nan"])
def test_page_of_odd_tables_is_whole(tmp_path, kind):
    nan = ScoreBlock("cka", "a", "a", ("x",), ("x",), [[np.nan]], 2)
    single = ScoreBlock("twonn", "a", "a", ("x", "y"), None, [1.0, np.inf], 2)
    table = ScoreTable({"nothing": [], "layers": [single], "nan": [nan]}[kind])
    page = Page(table.report(tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    shown = [attrs["id"] for tag, attrs in page.tags if tag == "div" and attrs.get("class") == "chart"]
    assert shown == {"nothing": [], "layers": ["curves"], "nan": ["heat"]}[kind]


def test_unwritable_path_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("tdprobe.viz.report._page", lambda table: pytest.fail("worked before it could write"))
    with pytest.raises(ConfigError, match=r"cannot write .*report\.html.*create the folder first"):
        sample(2).report(tmp_path / "missing" / "report.html")


@pytest.mark.parametrize("module", ["altair", "vl_convert"])
def test_missing_extra_is_named_and_nothing_is_written(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"tdprobe\[report\]"):
        sample(2).report(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


class Screen:
    """A report in the browser: choose, point, read."""

    def __init__(self, browser, path):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser = browser
        self.wait = WebDriverWait(browser, 30)
        browser.get_log("browser")
        browser.get(path.as_uri())
        self.wait.until(lambda driver: driver.execute_script("return document.body.dataset.ready") == "true")

    def cell(self, row, column):
        """Find the cell of two layers."""
        name = f"{row} / {column}:"
        return self.wait.until(lambda driver: driver.find_element("css selector", f'#heat [aria-label^="{name}"]'))

    def point_at(self, row, column):
        """Hover over a cell and return the tooltip as a dict."""
        from selenium.webdriver.common.action_chains import ActionChains

        heading = self.browser.find_element("tag name", "h1")
        ActionChains(self.browser).move_to_element(heading).move_to_element(self.cell(row, column)).perform()
        self.wait.until(lambda driver: self.tooltip().get("row") == row and self.tooltip().get("column") == column)
        return self.tooltip()

    def tooltip(self):
        """Return the visible tooltip as a dict."""
        script = """return [...document.querySelectorAll("#vg-tooltip-element.visible tr")]
            .map((line) => [...line.children].map((cell) => cell.textContent.trim()))"""
        return dict(self.browser.execute_script(script))

    def choose(self, menu, option):
        """Pick an option of the menu of that name and wait until the chart says so."""
        from selenium.webdriver.support.ui import Select

        select = self.browser.find_element("css selector", f'#heat-controls select[name="{menu}"]')
        Select(select).select_by_visible_text(option)
        self.wait.until(lambda driver: option in self.title())

    def title(self):
        """Return the title of the heat map."""
        return self.browser.find_element("css selector", "#heat .role-title-text").text

    def texts(self):
        """Return the texts in the heat chart."""
        return [text.text for text in self.browser.find_elements("css selector", "#heat text")]

    def frames(self):
        """Return the sizes of the frames around the marked row and column."""
        frames = self.browser.find_elements("css selector", '#heat .mark-rect path[stroke="#e8452c"]')
        return [(frame.size["width"], frame.size["height"]) for frame in frames]


@pytest.mark.parametrize("count", [3, 30])
def test_hovering_shows_the_score_of_the_table(browser, tmp_path, count):
    table = sample(count)
    screen = Screen(browser, table.report(tmp_path / "report.html"))
    assert screen.title() == "cka: base × base (n = 64)"
    assert screen.frames() == []
    for row, column in ((1, 2), (2, 0)):
        shown = screen.point_at(f"model.layers.{row}", f"model.layers.{column}")
        assert float(shown["score"]) == pytest.approx(table.matrix("cka", "base", "base")[row, column], rel=1e-4)
        assert f"Row {row}: model.layers.{row} against every column" in screen.texts()
    wide, high = sorted(screen.frames(), key=lambda size: size[1])
    assert wide[0] > 2.5 * wide[1]
    assert high[1] > 2.5 * high[0]
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []


def test_choosing_estimator_and_checkpoints_changes_the_score(browser, tmp_path):
    table = sample(30)
    screen = Screen(browser, table.report(tmp_path / "report.html"))
    for menu, option, names in (
        ("estimator", "distance", ("distance", "base", "base")),
        ("pair", "base × tuned", ("distance", "base", "tuned")),
        ("estimator", "cka", ("cka", "base", "tuned")),
    ):
        screen.choose(menu, option)
        shown = screen.point_at("model.layers.10", "model.layers.20")
        assert float(shown["score"]) == pytest.approx(table.matrix(*names)[10, 20], rel=1e-4)
    assert browser.get_log("browser") == []


def test_missing_score_is_grey_and_colours_can_follow_the_data(browser, tmp_path):
    names = ("a", "b")
    block = ScoreBlock("cka", "m", "m", names, names, [[0.9, np.nan], [0.8, 0.85]], 4)
    screen = Screen(browser, ScoreTable([block]).report(tmp_path / "report.html"))
    assert screen.cell("a", "b").get_attribute("fill") == "#bbbbbb"
    assert screen.point_at("a", "b")["score"] == "none"
    before = screen.cell("b", "a").get_attribute("fill")
    browser.find_element("css selector", "#heat-controls input[type=checkbox]").click()
    screen.wait.until(lambda driver: screen.cell("b", "a").get_attribute("fill") != before)
    # The smallest score takes the dark end of viridis, the largest the bright end.
    assert screen.cell("b", "a").get_attribute("fill") in ("#440154", "rgb(68, 1, 84)")
    assert screen.cell("a", "a").get_attribute("fill") in ("#fde725", "rgb(253, 231, 37)")
    assert browser.get_log("browser") == []


def test_hostile_names_run_nothing_in_the_browser(browser, tmp_path):
    evil = "<img src=x onerror=console.error(1)>"
    table = sample(2, checkpoints=(evil, "b"), estimators=(evil,), names="{}" + evil)
    screen = Screen(browser, table.report(tmp_path / "report.html"))
    shown = screen.point_at(f"0{evil}", f"1{evil}")
    assert float(shown["score"]) == pytest.approx(table.matrix(evil, evil, evil)[0, 1], rel=1e-4)
    assert browser.get_log("browser") == []


def test_scores_can_be_downloaded_without_a_network(browser, tmp_path):
    screen = Screen(browser, sample(3).report(tmp_path / "report.html"))
    link = screen.browser.find_element("id", "download")
    assert re.match(r"blob:", link.get_attribute("href"))
    assert link.get_attribute("download") == "scores.json"


def test_targets_are_curves_and_their_legend_has_room(browser, tmp_path):
    from selenium.webdriver.support.ui import Select

    layers, targets = ("h.0", "h.1", "h.2"), tuple(f"attributes[{i}]" for i in range(7))
    values = np.random.default_rng(0).uniform(size=(3, 7))
    mig = ScoreBlock("mig", "base", "attributes", layers, targets, values, 64, False, columns="targets")
    twonn = ScoreBlock("twonn", "base", "base", layers, None, [5.0, 7.0, 6.0], 64, se=[0.1, 0.2, 0.1])
    page = ScoreTable([twonn, *sample(3).blocks[:1], mig]).report(tmp_path / "report.html")
    assert Page(page.read_text(encoding="utf-8")).text("title") == "Layer scores: base"
    screen = Screen(browser, page)
    assert "mig" not in screen.browser.find_element("id", "heat-controls").text
    menu = screen.browser.find_element("css selector", '#curves-controls select[name="curve"]')
    Select(menu).select_by_visible_text("mig")

    def legend(driver):
        return [
            label for label in driver.find_elements("css selector", "#curves .role-legend-label text") if label.text
        ]

    screen.wait.until(lambda driver: len(legend(driver)) == 7)
    picture = browser.find_element("css selector", "#curves svg").rect
    assert all(label.rect["y"] + label.rect["height"] <= picture["y"] + picture["height"] for label in legend(browser))
    assert {label.text for label in legend(browser)} == {f"base: {target}" for target in targets}
    assert browser.get_log("browser") == []
