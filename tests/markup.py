"""Reads what a report wrote: HTML as elements and tables, Markdown and LaTeX tables as rows of texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = ("meta", "img", "br")


@dataclass
class Element:
    """An element with its attributes and what is inside."""

    name: str
    attributes: dict[str, str | None]
    inside: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    def all(self, name: str) -> list[Element]:
        """Elements of this name below, in their order."""
        found = []
        for part in self.inside:
            if isinstance(part, Element):
                found += [part] if part.name == name else []
                found += part.all(name)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> says an attribute twice"
        made = Element(tag, dict(attrs))
        self.open[-1].inside.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parsed(html: str) -> Element:
    """The document; every element must be closed by its own end."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].name}> is never closed"
    return reader.open[0]


def html_rows(table: Element) -> list[list[str]]:
    """Heads and rows of a table, as texts."""
    return [[field.text.strip() for field in row.inside] for row in table.all("tr")]  # type: ignore[union-attr]


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Heads and rows of every table, without marks."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)
    return [[_fields(line) for line in block.splitlines() if not set(line) <= set("|-")] for block in blocks]


def _fields(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line.strip()[1:-1])
    return [part.strip().replace("**", "").replace(r"\|", "|") for part in parts]


_SIGNS = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"\char34{}": '"',
}


def latex_tables(text: str) -> list[list[list[str]]]:
    """Heads and rows of every tabular, as they are read; a dash stands for none."""
    bodies = re.findall(r"\\begin\{tabular\}\{[lr]+\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    rules = (r"\toprule", r"\midrule", r"\bottomrule", r"\addlinespace", "")
    return [[_read(line) for line in body.split("\n") if line not in rules] for body in bodies]


def _read(line: str) -> list[str]:
    assert line.endswith(r" \\")
    return [_plain(part) for part in re.split(r"(?<!\\)&", line[:-3])]


def _plain(text: str) -> str:
    text = re.sub(r"\\multicolumn\{\d+\}\{l\}\{(.*)\}", r"\1", text.strip())
    text = re.sub(r"\\textbf\{(.*?)\}", r"\1", text)
    for code, sign in _SIGNS.items():
        text = text.replace(code, sign)
    return "-" if text == "--" else re.sub(r"\\([&%$#_{}])", r"\1", text)
