"""Rows of LongBench's files: where they lie in a directory or in data.zip, and what their fields must be."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from hcache.benchmarks.longbench_tasks import known_task
from hcache.benchmarks.source import DataError, Row, Rows, zip_member

ARCHIVE = "data.zip"


class Record(NamedTuple):
    """A row that was checked.

    Args:
        id: unique within the file: one that was there before has the number of its occurrence behind it.
        row: all of its fields, for the prompt.
        length: words, or characters in Chinese, of input, context and answers.
        all_classes: names of classes; empty where the task classifies nothing.
    """

    id: str
    row: Row
    answers: tuple[str, ...]
    length: int
    all_classes: list[str]


class _WrongField(Exception):
    """A field of a row that is not what it should be."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def names_of(task: str) -> list[str]:
    """What a directory may call the file with a task's rows, in the order of preference."""
    return [f"{task}.jsonl", f"data/{task}.jsonl", ARCHIVE]


def records(path: Path, task: str, rows: Rows) -> Iterator[Record]:
    """The rows of a task in the order of its file, one by one; `rows` is told what the file is called.

    Raises:
        DataError: a file that is damaged or lacks the task, and a broken row unless those are skipped.
    """
    taken: set[str] = set()
    with _opened(path, task, rows) as file:
        for number, row in rows.lines(file):
            try:
                record = _record(row, known_task(task).metric == "classification", taken)
            except _WrongField as wrong:
                rows.bad(number, wrong.name, str(wrong))
                continue
            taken.add(record.id)
            yield record


@contextmanager
def _opened(path: Path, task: str, rows: Rows) -> Iterator[IO[bytes]]:
    rows.place = str(path)
    if path.suffix != ".zip":
        with path.open("rb") as file:
            yield file
        return
    archive, name = zip_member(path, [f"data/{task}.jsonl", f"{task}.jsonl"])
    rows.place = f"{path}/{name}"
    try:
        with archive, archive.open(name) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{rows.place} is damaged ({error}); get {path.name} again") from error


def _record(row: Row, classified: bool, taken: set[str]) -> Record:
    for name in ("context", "input"):
        if not isinstance(_value(row, name), str):
            raise _WrongField(name, f"must be a text, it is {short(row[name])}")
    classes = _classes(row) if classified else []
    return Record(_unused_id(row, taken), row, _answers(row), _length(row), classes)


def _value(row: Row, name: str) -> Any:
    if name not in row:
        raise _WrongField(name, "is missing")
    return row[name]


def _answers(row: Row) -> tuple[str, ...]:
    """A list of texts or numbers; one that stands alone is a list of one."""
    value = _value(row, "answers")
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(_is_plain(answer) for answer in answers):
        raise _WrongField("answers", f"must be a list of one or more texts, it is {short(value)}")
    return tuple(str(answer) for answer in answers)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _classes(row: Row) -> list[str]:
    value = _value(row, "all_classes")
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise _WrongField("all_classes", f"must be the list of the task's classes, it is {short(value)}")
    return value


def _length(row: Row) -> int:
    value = _value(row, "length")
    if not isinstance(value, int) or isinstance(value, bool):
        raise _WrongField("length", f"must be a number of words, it is {short(value)}")
    return value


def _unused_id(row: Row, taken: set[str]) -> str:
    value = _value(row, "_id")
    if not _is_plain(value):
        raise _WrongField("_id", f"must be a text, it is {short(value)}")
    name, occurrence = str(value), 1
    while name in taken:
        occurrence += 1
        name = f"{value}#{occurrence}"
    return name


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
