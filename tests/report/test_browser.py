"""The page in a real browser: at three widths and in both themes."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress_jax import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LACKING = [name for name in ("playwright", "vl_convert") if not importlib.util.find_spec(name)]
LACKING += [] if CHROMIUM else ["Chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}"),
]

OVERLAPS = """() => {
  const clash = [];
  for (const chart of document.querySelectorAll(".drawing")) {
    const texts = [...chart.querySelectorAll("text")].filter((each) =>
      each.textContent && getComputedStyle(each).opacity > 0);
    const boxes = texts.map((each) => each.getBoundingClientRect());
    for (let i = 0; i < boxes.length; i++) for (let k = 0; k < i; k++) {
      const a = boxes[i], b = boxes[k];
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 1 && y > 3) clash.push([chart.id, texts[i].textContent, texts[k].textContent]);
    }
  }
  return clash;
}"""
CUT = """() => [...document.querySelectorAll(".drawing")].flatMap((chart) => {
  const frame = chart.getBoundingClientRect();
  return [...chart.querySelectorAll("text")].filter((each) => each.textContent).filter((each) => {
    const box = each.getBoundingClientRect();
    return box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2 ||
      box.bottom > frame.bottom + 2;
  }).map((each) => [chart.id, each.textContent]);
})"""
NAMED = """() => [...document.querySelectorAll("#chart-front-nbytes [class*=labels_marks] text")]
  .filter((each) => each.textContent && getComputedStyle(each).opacity > 0)
  .map((each) => each.textContent)"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Return a function that opens a page; whatever it complains about or asks for fails."""
    wrong: list[str] = []

    def opening(file: Path, width: int = 1000, scheme: str = "light"):
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append("a dialog"))
        page.on("request", lambda request: asked(request.url))
        page.goto(file.as_uri())
        page.evaluate("window.drawn")
        return page

    def asked(url: str):
        if not re.match("data:|blob:|file:.*report.html", url):
            wrong.append(f"asked for {url}")

    yield opening
    assert not wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1600])
def test_fits_and_no_label_lies_on_another(whole, opened, width: int, scheme: str):
    page = opened(report.write(whole()), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('.drawing svg').length") == page.evaluate(
        "document.querySelectorAll('.drawing').length"
    )
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(CUT) == []
    # Where eleven networks lie at one place not all names have room, those of the others do.
    assert {"teacher", "student", "candidate-number-2"} <= set(page.evaluate(NAMED))
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 382) == (scheme == "light")


def test_chosen_colors_win_and_reach_the_charts(whole, opened):
    page = opened(report.write(whole()))
    ink = "getComputedStyle(document.querySelector('.drawing text')).fill"
    before = page.evaluate(ink)
    page.focus("#theme")
    page.select_option("#theme", "dark")
    page.evaluate("window.drawn")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 382
    assert page.evaluate(ink) != before


def test_tables_sort_by_keyboard(whole, opened):
    page = opened(report.write(whole()))
    head = page.locator("th", has_text="bytes on disk").first
    column = page.locator("#part-1 th").all_inner_texts().index(head.inner_text())
    row = f"(row) => row.cells[{column}].textContent"
    cells = f"[...document.querySelectorAll('#part-1 tbody tr')].map({row})"
    head.locator("button").focus()
    for order, reverse in (("ascending", False), ("descending", True)):
        page.keyboard.press("Enter")
        found = [int(text.replace(",", "")) for text in page.evaluate(cells)]
        assert found == sorted(found, reverse=reverse) and len(found) == 11
        assert head.get_attribute("aria-sort") == order
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('th') !== null")
    leaves = page.locator("tr.total").first.locator("xpath=ancestor::table")
    leaves.locator("th button").first.press("Enter")
    leaves.locator("th button").first.press("Enter")
    assert leaves.locator("th").first.get_attribute("aria-sort") == "descending"
    firsts = [row.split("\t")[0] for row in leaves.locator("tbody").inner_text().splitlines()]
    assert firsts == ["params/d/kernel", "params/d/bias", "header and metadata", "file"]


def test_charts_zoom_by_keyboard_and_are_saved(whole, opened):
    page = opened(report.write(whole()))
    figure = page.locator("figure[data-chart=front-nbytes]")
    ticks = "[...document.querySelectorAll('#chart-front-nbytes text')].map((t) => t.textContent)"
    before = page.evaluate(ticks)
    figure.locator("[data-do=in]").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"JSON.stringify({ticks}) !== {before!r}.toString()")
    page.wait_for_timeout(200)
    assert page.evaluate(ticks) != before
    figure.locator("[data-do=all]").press("Enter")
    page.wait_for_timeout(500)
    assert page.evaluate(ticks) == before
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        with page.expect_download() as saved:
            figure.locator(f"[data-do={kind}]").press("Enter")
        assert saved.value.suggested_filename == f"front-nbytes.{kind}"
        assert Path(saved.value.path()).read_bytes().startswith(start)
    with page.expect_download() as saved:
        page.locator("#part-1 a", has_text="CSV").press("Enter")
    assert Path(saved.value.path()).read_text().startswith("network,")


def test_hover_tells_of_a_network(whole, opened):
    page = opened(report.write(whole()))
    page.locator("#chart-front-nbytes [class*=points_marks] path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "teacher" in page.inner_text("#vg-tooltip-element")


def test_hostile_words_are_words(whole, opened, evil: str):
    page = opened(report.write(whole(evil, evil.replace("/", ""))))
    for path in page.locator("#chart-front-nbytes [class*=points_marks] path").all()[:4]:
        path.hover(force=True)
    assert page.evaluate("window.owned") is None
    assert page.inner_text("h1") == evil
    assert page.evaluate("document.querySelectorAll('.drawing svg').length") > 8
