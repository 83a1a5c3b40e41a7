"""A file that is one JSON array, read entry by entry: as little is held as is asked for."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from hcache.benchmarks.source import DataError, Row, Rows

BLOCK = 2**22
"""Bytes read at a time; more where an entry is longer."""

_SPACE = re.compile(r"[ \t\r\n]*")


def objects(rows: Rows, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    """(number from 1, object) of every entry, as `Rows.array`, but decoded when it is asked for.

    Raises:
        DataError: the file is something else, or cut short.
        RowError: an entry that is no object.
    """
    for number, entry in enumerate(ArrayReader(file, rows.place, BLOCK).entries(), start=1):
        if isinstance(entry, dict):
            yield number, entry
        else:
            rows.bad(number, None, f"is a JSON {type(entry).__name__}, not an object")


class ArrayReader:
    """Holds a block of the file and the entry that it is in.

    Args:
        place: what messages call the file.
        block: bytes read at a time.
    """

    def __init__(self, file: IO[bytes], place: str, block: int) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._place = place
        self._block = block
        self._value = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def entries(self) -> Iterator[Any]:
        """Every entry. Raises DataError where the file is no array, or ends inside it."""
        first = self._take()
        if first != "[":
            raise self._broken(0, f"begins with {first!r}, not with the '[' of a JSON array")
        number, ended = 0, self._next() == "]"
        if ended:
            self._take()
        while not ended:
            number += 1
            yield self._entry(number)
            separator = self._take()
            if separator not in (",", "]"):
                raise self._broken(number, f"is followed by {separator!r}, not by ',' or ']'")
            ended = separator == "]"
        if self._next():
            raise self._broken(number, "ends the array, and more follows")

    def _next(self) -> str:
        """The next character that is no space, "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _take(self) -> str:
        found = self._next()
        self._at += len(found)
        return found

    def _entry(self, number: int) -> Any:
        self._next()
        while True:
            try:
                value, end = self._value(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self._broken(number, f"is no JSON ({error.msg})") from error
                continue
            if end < len(self._text) or not self._more():  # a number may go on in the next block
                self._at = end
                return value

    def _more(self) -> bool:
        """Read on, by what is held at least, so that a long entry isn't tried over and over."""
        held = self._text[self._at :]
        while read := self._file.read(max(self._block, len(held))):
            if text := self._decoded(read):
                self._text, self._at = held + text, 0
                return True
        self._decoded(b"")
        return False

    def _decoded(self, read: bytes) -> str:
        try:
            return self._decoder.decode(read, final=not read)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._place} is no UTF-8 text ({error.reason}); it may be cut short: get it again"
            ) from error

    def _broken(self, number: int, reason: str) -> DataError:
        where = f"{self._place} row {number}" if number else self._place
        return DataError(f"{where} {reason}; the file may be cut short: get it again")
