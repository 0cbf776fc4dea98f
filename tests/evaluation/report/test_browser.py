"""Reports in a real browser: they draw, the slider works, nothing fails, and a phone does not scroll sideways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.report.report import make_comparison, make_report
from tests.e2e.browser import CHROMIUM, Tab, tab
from tests.evaluation.report.runs import HOSTILE, made_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
BOXES = "document.querySelectorAll('.box.right, .box.wrong').length"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    runs = [made_run(folder / name, seed=4) for name in ("one", "two")]
    rows = (runs[1] / "detections.json").read_text().replace('"category_id": 1', '"category_id": 2')
    (runs[1] / "detections.json").write_text(rows)
    make_report(runs[0], {})
    make_comparison(runs, {}, folder / "both.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Tab]:
    with tab() as opened:
        yield opened


def opened(browser: Tab, page: Path, *, width: int = 1400) -> Tab:
    browser.open("about:blank", width=width, height=900)
    browser.wait_for("location.href === 'about:blank'")
    browser.addresses.clear()
    browser.open(page.as_uri(), width=width, height=900)
    browser.wait_for("document.readyState === 'complete' && document.querySelector('.counts')?.textContent")
    return browser


def slide(browser: Tab, value: float) -> int:
    """Move the slider as a user does, and return how many detections are drawn."""
    browser.evaluate(
        f"(slider => {{ slider.value = {value}; slider.dispatchEvent(new Event('input')); }})"
        "(document.getElementById('threshold'))"
    )
    return int(browser.evaluate(BOXES))


def test_nothing_fails_and_nothing_is_loaded(browser: Tab, pages: Path) -> None:
    for page in (pages / "one" / "report.html", pages / "both.html"):
        opened(browser, page)
        assert [address for address in browser.addresses if not address.startswith(("data:", "file:"))] == []
        assert [address for address in browser.addresses if address.startswith("file:")] == [page.as_uri()]
    assert browser.failures == [] and browser.console_errors == []


def test_names_of_strangers_do_nothing(browser: Tab, pages: Path) -> None:
    opened(browser, pages / "one" / "report.html")
    assert browser.evaluate("document.title") == "one"
    assert browser.evaluate("document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0
    browser.evaluate("document.getElementById('names').click()")
    assert HOSTILE[:9] in browser.evaluate("[...document.querySelectorAll('.box span')].map(e => e.textContent).join()")


def test_the_slider_changes_what_is_drawn_and_counted(browser: Tab, pages: Path) -> None:
    opened(browser, pages / "one" / "report.html")
    counts = "[...document.querySelectorAll('.counts')].map(each => each.textContent).join()"
    before = browser.evaluate(counts)
    drawn = [slide(browser, value) for value in (0.05, 0.3, 0.6, 1)]
    assert drawn == sorted(drawn, reverse=True) and len(set(drawn)) == 4 and drawn[-1] == 0
    assert browser.evaluate(counts) != before
    assert not browser.evaluate("document.getElementById('own').checked")  # the slider is for all classes
    browser.evaluate("document.getElementById('own').click()")
    assert browser.evaluate(counts) == before


def test_switches_hide_what_they_name(browser: Tab, pages: Path) -> None:
    opened(browser, pages / "one" / "report.html")
    truth = "document.querySelectorAll('.box.truth, .box.missed').length"
    assert browser.evaluate(truth) > 0 and browser.evaluate(BOXES) > 0
    browser.evaluate("document.getElementById('found').click()")
    assert browser.evaluate(BOXES) == 0 and browser.evaluate(truth) > 0
    browser.evaluate("document.getElementById('truth').click()")
    assert browser.evaluate("document.querySelectorAll('.box').length") == 0


def test_a_comparison_shows_the_detections_of_either_run(browser: Tab, pages: Path) -> None:
    opened(browser, pages / "both.html")
    counts = "[...document.querySelectorAll('.counts')].map(each => each.textContent).join()"
    first = browser.evaluate(counts)
    browser.evaluate("(s => { s.value = 1; s.dispatchEvent(new Event('change')); })(document.getElementById('run'))")
    assert browser.evaluate(counts) != first


@pytest.mark.parametrize("page", ["one/report.html", "both.html"])
def test_a_phone_does_not_scroll_sideways(browser: Tab, pages: Path, page: str) -> None:
    opened(browser, pages / page, width=390)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
