"""Markdown: a table, a list below a heading, a document of parts. Knows nothing of what stands in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; no line end behind the last row."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def section(title: str, items: Iterable[str]) -> str:
    """A heading and a list below it, each item once; nothing where there is no item."""
    found = dict.fromkeys(items)
    return f"## {title}\n\n{bullets(found)}" if found else ""


def bullets(items: Iterable[str]) -> str:
    """A list; no line end behind the last item."""
    return "\n".join(f"- {item}" for item in items)


def document(parts: Iterable[str]) -> str:
    """The parts that are not empty, with a blank line between them."""
    return "\n\n".join(part for part in parts if part) + "\n"
