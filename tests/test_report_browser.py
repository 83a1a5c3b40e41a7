"""A report in a real browser: no word on the console, nothing loaded, clicks sort, every width and colour."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from analysis.report import main
from tests.test_report import sweep

pytest.importorskip("pandas")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium on the path", allow_module_level=True)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("browser") / "in"
    sweep(root)
    assert main([str(root)]) == 0
    return (root / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def shown(browser: Any, address: str, complaints: list[str]) -> Iterator[Any]:
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if "http" in request.url[:5] else None)
    page.goto(address)
    yield page
    page.close()


def column(page: Any, place: int) -> list[str]:
    """Texts of a column of the first table."""
    rows = page.query_selector_all("table >> nth=0 >> tbody tr")
    return [row.query_selector_all("th, td")[place].inner_text() for row in rows]


def click(page: Any, place: int) -> str | None:
    """Click on a heading of the first table; how it says it is sorted."""
    page.click(f"table >> nth=0 >> thead th:nth-child({place + 1}) button")
    said: str | None = page.get_attribute(f"table >> nth=0 >> thead th:nth-child({place + 1})", "aria-sort")
    return said


def test_nothing_is_said_on_the_console_and_nothing_is_loaded(shown: Any, complaints: list[str]) -> None:
    for place in range(3):
        click(shown, place)
    assert complaints == []


def test_a_click_sorts_by_value_and_leaves_what_is_missing_last(shown: Any) -> None:
    heads = shown.query_selector_all("table >> nth=0 >> thead th")
    place = [head.inner_text() for head in heads].index("prefill ms")
    assert click(shown, place) == "ascending"
    up = column(shown, place)
    assert [text.split(" (")[0] for text in up[:6]] == ["1.0", "25.5", "25.5", "33.3", "51.0", "51.0"]
    assert up[6] == "-"
    assert click(shown, place) == "descending"
    assert column(shown, place)[:6] == [*up[4:6], up[3], *up[1:3], up[0]]
    assert column(shown, place)[6] == "-"
    place = [head.inner_text() for head in heads].index("resident")
    assert click(shown, place) == "ascending"
    assert column(shown, place) == ["0.103", "0.103", "0.250", "0.253", "0.253", "1.000", "-"]
    assert click(shown, 0) == "ascending"
    assert column(shown, 0) == ["fullkv", *["h2o"] * 2, *["omnikv"] * 2, *["snapkv"] * 2]
    assert len(shown.query_selector_all("table >> nth=0 >> thead th[aria-sort]")) == 1


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_no_width_makes_the_page_wider_than_the_window(shown: Any, width: int) -> None:
    shown.set_viewport_size({"width": width, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth") <= width


def test_it_is_dark_where_that_is_preferred(shown: Any) -> None:
    def brightness() -> int:
        colour: str = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    shown.emulate_media(color_scheme="light")
    assert brightness() > 200
    shown.emulate_media(color_scheme="dark")
    assert brightness() < 60
