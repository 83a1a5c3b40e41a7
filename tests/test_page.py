"""analysis.page: what is put into an element is text and stays text; a page loads nothing."""

from __future__ import annotations

import pytest

from analysis.page import Entry, bullets, element, escaped, joined, page, picture, table
from tests.markup import html_rows, parsed

HOSTILE = "</td><script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"


def test_text_stays_text_wherever_it_is_put() -> None:
    shown = page(
        HOSTILE,
        element("p", HOSTILE, title=HOSTILE),
        bullets([HOSTILE]),
        table(HOSTILE, [HOSTILE, "b"], [[Entry(HOSTILE), Entry(HOSTILE)]], below=HOSTILE),
        picture(b"<svg/>", HOSTILE, HOSTILE, "lines"),
    )
    document = parsed(shown)
    assert len(document.all("script")) == 1
    assert [image.attributes["src"] for image in document.all("img")] == [
        "data:image/svg+xml;base64,PHN2Zy8+"
    ]
    (paragraph,) = document.all("p")
    assert (paragraph.text, paragraph.attributes) == (HOSTILE, {"title": HOSTILE})
    assert html_rows(document.all("table")[0])[1] == [HOSTILE, HOSTILE]
    assert document.all("img")[0].attributes["alt"] == HOSTILE


def test_html_is_not_escaped_twice() -> None:
    assert element("p", element("b", "a < b"), " & c") == "<p><b>a &lt; b</b> &amp; c</p>"
    assert joined(["<", escaped("<")]) == "&lt;&lt;"


@pytest.mark.parametrize("sign", ["\x00", "\x1b", "\x85", "\u202e", "\u2066", "\ufffe"])
def test_signs_that_cannot_be_seen_are_named(sign: str) -> None:
    assert escaped(f"a{sign}b") == f"a\\u{ord(sign):04x}b"


def test_half_a_sign_can_be_written() -> None:
    assert escaped("a\ud800b").encode("utf-8") == "a\ufffdb".encode()
    assert escaped("line\n\tand é 中 😀") == "line\n\tand é 中 😀"


def test_a_table_names_itself_its_columns_and_rows() -> None:
    rows = [[Entry("first"), Entry("1.5", 1.5000001, True), Entry("-", None, True)]]
    document = parsed(table("Numbers", ["name", "x", "y"], rows))
    assert document.all("caption")[0].text == "Numbers"
    assert [head.attributes["scope"] for head in document.all("th")] == ["col", "col", "col", "row"]
    number, none = document.all("td")
    assert number.attributes == {"class": "number", "data-value": "1.5000001"}
    assert none.attributes == {"class": "number"}


def test_nothing_else_may_run_and_nothing_is_loaded() -> None:
    document = parsed(page("t", element("p", "x")))
    policy = next(m for m in document.all("meta") if m.attributes.get("http-equiv"))
    said = str(policy.attributes["content"])
    assert "default-src 'none'" in said
    assert "script-src 'sha256-" in said
    assert not document.all("link")
    assert not [script for script in document.all("script") if script.attributes]


def test_an_empty_list_leaves_nothing() -> None:
    assert bullets([]) == ""
