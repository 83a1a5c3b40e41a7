"""Markdown: a table, a list below a heading, a document of parts. Knows nothing of what stands in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; no line end behind the last row."""
    lines = [_row(header), f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *map(_row, rows)])


def _row(fields: Iterable[str]) -> str:
    """Fields in one line; a bar within one would begin another."""
    return f"| {' | '.join(' '.join(field.split()).replace('|', chr(92) + '|') for field in fields)} |"


def section(title: str, items: Iterable[str]) -> str:
    """A heading and a list below it, each item once; nothing where there is no item."""
    found = dict.fromkeys(items)
    return f"## {title}\n\n{bullets(found)}" if found else ""


def nested(items: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A list whose items have lists below them."""
    return "\n".join("\n".join([f"- {item}", *(f"  - {part}" for part in parts)]) for item, parts in items)


def bullets(items: Iterable[str]) -> str:
    """A list; no line end behind the last item."""
    return "\n".join(f"- {item}" for item in items)


def document(parts: Iterable[str]) -> str:
    """The parts that are not empty, with a blank line between them."""
    return "\n\n".join(part for part in parts if part) + "\n"
