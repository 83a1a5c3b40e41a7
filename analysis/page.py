"""HTML in parts: elements that escape what is put into them, tables, a page that needs nothing but itself.

Knows nothing of records. Its looks are in page.css, its sorting in page.js beside this file.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_VOID = ("meta", "img", "br")
_LOOKS = Path(__file__).with_name("page.css")
_SORTING = Path(__file__).with_name("page.js")
# Characters that are errors in HTML wherever they stand, and those that turn the text around them.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Html(str):
    """Text that is HTML already; any other text is escaped where it is put into an element."""


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table.

    Args:
        content: text, or HTML.
        value: by which the column is sorted; None sorts `content` as text, or behind all numbers.
        is_number: set to the right, in figures of one width.
    """

    content: str
    value: float | None = None
    is_number: bool = False


def escaped(text: str) -> Html:
    """Text as HTML; what can't be seen or would do harm becomes its code point in words."""
    visible = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return Html(html.escape(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", visible)))


def element(name: str, /, *children: str, **attributes: str) -> Html:
    """An element; an attribute's name loses an underscore at its end, others become hyphens."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{named}>" if name in _VOID else f"<{name}{named}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Html:
    """Parts one behind another."""
    return Html("".join(child if isinstance(child, Html) else escaped(child) for child in children))


def bullets(items: Iterable[str]) -> Html:
    """A list; nothing where there is no item."""
    found = [element("li", item) for item in items]
    return element("ul", *found) if found else Html("")


def folded(title: str, *children: str) -> Html:
    """What is shown when asked for."""
    return element("details", element("summary", title), *children)


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[Entry]], kind: str = "", below: str = ""
) -> Html:
    """A table that is sorted by a click on a heading; the first column names the rows.

    below: a second line of the caption.
    """
    filled = list(rows)
    numbers = [any(row[place].is_number for row in filled) for place in range(len(header))]
    heads = [_head(name, number) for name, number in zip(header, numbers, strict=True)]
    body = [element("tr", *_row(row)) for row in filled]
    whole = element(
        "table",
        element("caption", caption, *([element("div", below)] if below else [])),
        element("thead", element("tr", *heads)),
        element("tbody", *body),
        class_=f"sortable {kind}".strip(),
    )
    return element("div", whole, class_="wide", tabindex="0", role="region", aria_label=caption)


def _head(name: str, is_number: bool) -> Html:
    return element("th", name, scope="col", **({"class_": "number"} if is_number else {}))


def _row(row: Sequence[Entry]) -> Iterable[Html]:
    for position, entry in enumerate(row):
        named = {"class_": "number"} if entry.is_number else {}
        if entry.value is not None:
            named["data_value"] = repr(entry.value)
        if position == 0:
            yield element("th", entry.content, scope="row", **named)
        else:
            yield element("td", entry.content, **named)


def picture(svg: bytes, words: str, caption: str, kind: str) -> Html:
    """An SVG within the page; words: what it shows, for who can't see it."""
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return element(
        "figure", element("img", src=source, alt=words), element("figcaption", caption), class_=kind
    )


def page(title: str, *body: str) -> str:
    """A document that loads nothing: looks and sorting are inside, and nothing else may run."""
    looks, sorting = (path.read_text(encoding="utf-8") for path in (_LOOKS, _SORTING))
    digest = base64.b64encode(hashlib.sha256(sorting.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(looks)),
    )
    whole = element("body", *body, element("script", Html(sorting)))
    return f"<!DOCTYPE html>\n{element('html', head, whole, lang='en')}\n"
