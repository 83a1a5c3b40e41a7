"""Rows of InfiniteBench's files: what their fields must be, and what a template's placeholders stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hcache.benchmarks.infinitebench_template import Template
from hcache.benchmarks.scoring import infinitebench as scoring
from hcache.benchmarks.source import Row, Rows


@dataclass(frozen=True)
class Question:
    """One row, ready to be asked.

    Args:
        context, question: the prompt in two parts.
        label: answers in their types, as the scorers take them.
        options: of a choice, else empty.
    """

    id: str
    context: str
    question: str
    label: list[Any]
    options: list[str]


class _WrongField(Exception):
    """A field of a row that is not what it should be: its name, and why."""


def sound(
    task: str, template: Template, rows: Rows, numbered: Iterator[tuple[int, Row]]
) -> Iterator[Question]:
    """Rows that are what they should be; a second row with the same id has its row number behind it.

    Raises:
        RowError: for others, unless they are counted.
    """
    contexts: dict[str, str] = {}  # questions on one book share its text
    seen: set[str] = set()
    for number, row in numbered:
        try:
            context, question = template.filled(values_of(task, template.names, row))
            options = _options(row) if task in scoring.CHOICE_TASKS else []
            label = _label(task, row, options)
        except _WrongField as wrong:
            name, reason = wrong.args
            rows.bad(number, name, reason)
            continue
        own = str(number - 1 if row.get("id") is None else row["id"])
        name = own if own not in seen else f"{own} (row {number})"
        seen.add(name)
        yield Question(name, contexts.setdefault(context, context), question, label, options)


def values_of(task: str, names: frozenset[str], row: Row) -> dict[str, str]:
    """What a template's placeholders stand for.

    Raises:
        _WrongField: a field that is needed is missing or not as it should be.
    """
    values = {"context": _text(row, "context" if "context" in row else "content")}
    if names & {"input", "question"}:
        values["input"] = values["question"] = _text(row, "input")
    if names & {"func", "func_call"}:
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", _text(row, "input"))
        if call is None:
            raise _WrongField("input", "names no call such as func_1(2)")
        values |= {"func_call": call[0], "func": call[0].split("(")[0]}
    if "prefix" in names:
        wanted = re.search(r"The .+ of", _text(row, "input"))
        if wanted is None:
            raise _WrongField("input", "does not say what number is wanted: 'The ... of'")
        values["prefix"] = f"What is {wanted[0].lower()[:-3]} in the following list?"
    choices = sorted(name for name in names if name.startswith("OPTION_"))
    if choices:
        options = _options(row)
        if len(options) < len(choices):
            raise _WrongField("options", f"must be {len(choices)} choices, there are {len(options)}")
        values |= dict(zip(choices, options, strict=False))
    return values


def _text(row: Row, name: str) -> str:
    """Raises _WrongField for what is no text."""
    if name not in row:
        raise _WrongField("context" if name == "content" else name, "is missing")
    if not isinstance(row[name], str):
        raise _WrongField(name, f"must be a text, is a {type(row[name]).__name__}")
    found: str = row[name]
    return found


def _options(row: Row) -> list[str]:
    """Choices as texts; none where there are none. Raises _WrongField for what is no list of them."""
    options = row.get("options")
    if options is None:
        return []
    if not isinstance(options, list) or not all(isinstance(part, str | int | float) for part in options):
        raise _WrongField("options", f"must be a list of texts, is {options!r:.60}")
    return [str(part) for part in options]


def _label(task: str, row: Row, options: list[str]) -> list[Any]:
    """Raises _WrongField for answers that the task can't have."""
    if row.get("answer") is None:
        raise _WrongField("answer", "is missing")
    try:
        return scoring.label(task, row["answer"], options)
    except ValueError as error:
        raise _WrongField("answer", str(error)) from error
