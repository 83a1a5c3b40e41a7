"""Rows of LongBench v2: what classes of questions there are, and what a row's fields must be."""

from __future__ import annotations

from collections.abc import Iterator

from hcache.benchmarks.scoring.longbench_v2 import LETTERS
from hcache.benchmarks.source import Row, Rows

QUESTIONS = 503
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")
DOMAINS = (
    "Single-Document QA",
    "Multi-Document QA",
    "Long In-context Learning",
    "Long-dialogue History Understanding",
    "Code Repository Understanding",
    "Long Structured Data Understanding",
)

_TEXTS = ("_id", "domain", "difficulty", "length", "question", "context", "answer")
_CHOICES = tuple(f"choice_{letter}" for letter in LETTERS)
_ALLOWED = {"difficulty": DIFFICULTIES, "length": LENGTHS, "answer": LETTERS}


def sound(rows: Rows, numbered: Iterator[tuple[int, Row]]) -> Iterator[Row]:
    """Rows that are what they should be. Raises RowError for others, or counts them."""
    seen: set[str] = set()
    for number, row in numbered:
        fault = _fault(row)
        if fault is None and row["_id"] in seen:
            fault = "_id", f"'{row['_id']}' is that of an earlier row too"
        if fault is not None:
            rows.bad(number, *fault)
            continue
        seen.add(row["_id"])
        yield row


def _fault(row: Row) -> tuple[str, str] | None:
    """The first field that is wrong, and how."""
    for name in (*_TEXTS, *_CHOICES):
        value = row.get(name)
        if value is None:
            return name, "is missing"
        if not isinstance(value, str):
            return name, f"must be a text, is a {type(value).__name__}"
        if name in _TEXTS and not value.strip():
            return name, "is blank"
        if value not in _ALLOWED.get(name, (value,)):
            return name, f"is {value[:40]!r}, must be one of {', '.join(_ALLOWED[name])}"
    return None
