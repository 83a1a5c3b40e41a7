"""Lines of JSON that a run or another program left, read without touching the file; each field is checked.

`hcache.records.Predictions` is for a run that goes on: it cuts off a torn line. Here such a line is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class LineError(ValueError):
    """A line that is not what it should be; the message names file, line and field."""


@dataclass(frozen=True)
class Place:
    """A line's file and its number, from 1."""

    path: Path
    number: int

    def error(self, reason: str, name: str | None = None) -> LineError:
        """What is wrong with the line, or with its field `name`."""
        field = "" if name is None else f", field '{name}'"
        return LineError(f"{self.path} line {self.number}{field}: {reason}")


@dataclass(frozen=True)
class ReadLine:
    """One line and where it stands."""

    place: Place
    values: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first of the fields `names` that is there. Raises LineError for none, or no text."""
        name, value = self._first(names)
        if not isinstance(value, str):
            raise self.place.error(f"must be text, it is {_kind(value)}", name)
        return value

    def texts(self, *names: str) -> list[str]:
        """As `text`, for a list of texts. Raises LineError."""
        name, value = self._first(names)
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise self.place.error(f"must be a list of texts, it is {_kind(value)}", name)
        return value

    def whole(self, name: str) -> int:
        """A whole number. Raises LineError."""
        _, value = self._first([name])
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.place.error(f"must be a whole number, it is {_kind(value)}", name)
        return value

    def number(self, name: str) -> float:
        """A number. Raises LineError."""
        _, value = self._first([name])
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.place.error(f"must be a number, it is {_kind(value)}", name)
        return value

    def value(self, *names: str) -> Any:
        """The first of the fields `names` that is there. Raises LineError for none."""
        return self._first(names)[1]

    def rest(self, *taken: str) -> dict[str, Any]:
        """All other fields."""
        return {name: value for name, value in self.values.items() if name not in taken}

    def _first(self, names: Sequence[str]) -> tuple[str, Any]:
        for name in names:
            if name in self.values:
                return name, self.values[name]
        raise self.place.error("is missing", " or ".join(names))


def read_lines(path: Path) -> list[ReadLine]:
    """Every line that isn't blank.

    Raises:
        LineError: a line that is no JSON object, or no line at all.
        OSError: the file can't be read.
    """
    found = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                found.append(_parsed(Place(path, number), raw))
    if not found:
        raise LineError(f"{path} holds no line")
    return found


def _parsed(place: Place, raw: bytes) -> ReadLine:
    try:
        values = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise place.error(f"is no JSON ({error}); it may be cut short") from error
    if not isinstance(values, dict):
        raise place.error(f"must be a JSON object, it is {_kind(values)}")
    return ReadLine(place, values)


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names: dict[type, str] = {str: "text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    if isinstance(value, list) and not all(isinstance(part, str) for part in value):
        return f"a list with {_kind(next(part for part in value if not isinstance(part, str)))}"
    return names[type(value)]
