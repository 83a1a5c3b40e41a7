"""Where a benchmark's files come from, and how rows are read from them.

A file is looked for in `data_dir`, then in `data/<benchmark>/` below the working directory, then on the Hub
at a pinned revision, where it is downloaded once into the Hub's own cache. Rows are read one by one; one that
is broken is an error that names file, line and field, or is counted where `skip_bad_rows` says so. Knows no
benchmark by name.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

Row = dict[str, Any]


class DataError(ValueError):
    """A benchmark's file that is not there, or not what it should be; the message says what to do."""


class RowError(DataError):
    """One row that is not what it should be; see `Rows.bad`."""


@dataclass(frozen=True)
class HubFiles:
    """A data set's repository on the Hub.

    Args:
        repo: its id.
        revision: a commit, so that a record's revision says what was read.
    """

    repo: str
    revision: str

    def fetch(self, filename: str) -> Path:
        """The file, from the Hub's cache or downloaded into it with a progress bar.

        Raises:
            DataError: it can't be had; the message says how to go on without a network.
        """
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repo, filename, repo_type="dataset", revision=self.revision))
        except (OSError, ValueError) as error:  # huggingface_hub's errors are of these kinds
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"{filename} of {self.repo} can't be downloaded ({type(error).__name__}: {reason}); run "
                "runner=fetch where there is a network, or set benchmark.data_dir to where it lies"
            ) from error


def local_file(benchmark: str, data_dir: str | None, names: Sequence[str]) -> Path | None:
    """The first of `names` that is in `data_dir`, or else in data/<benchmark>/; None if none is.

    Raises:
        DataError: `data_dir` is not a directory.
    """
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise DataError(f"benchmark.data_dir={data_dir} is not a directory")
    places = [] if data_dir is None else [Path(data_dir).expanduser()]
    for place in [*places, Path("data") / benchmark]:
        for name in names:
            if (place / name).is_file():
                return place / name
    return None


@dataclass
class Rows:
    """Rows of one file, and what was wrong with those that were skipped.

    Args:
        place: what messages call the file.
        skip: count broken rows instead of raising.
    """

    place: str
    skip: bool = False
    skipped: list[str] = field(default_factory=list)

    def lines(self, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
        """(line number, object) of every line of a JSON Lines file that isn't blank.

        Raises:
            RowError: a line that is no JSON object.
        """
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                self.bad(number, None, f"is no JSON: {error}")
                continue
            if not isinstance(row, dict):
                self.bad(number, None, f"is a JSON {type(row).__name__}, not an object")
                continue
            yield number, row

    def array(self, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
        """(number from 1, object) of every entry of a file that is one JSON array.

        Raises:
            DataError: the file is something else, or cut short.
            RowError: an entry that is no object.
        """
        try:
            entries = json.load(io.TextIOWrapper(file, encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(
                f"{self.place} is no JSON file ({error}); it may be cut short: get it again"
            ) from error
        if not isinstance(entries, list):
            raise DataError(f"{self.place} must hold one JSON array, it holds a {type(entries).__name__}")
        for number, row in enumerate(entries, start=1):
            if isinstance(row, dict):
                yield number, row
            else:
                self.bad(number, None, f"is a JSON {type(row).__name__}, not an object")

    def bad(self, number: int, name: str | None, reason: str) -> None:
        """A broken row: raise, or count it where that was asked for.

        Args:
            name: the field; None for the row itself.

        Raises:
            RowError: unless rows are skipped.
        """
        where = f"{self.place} row {number}" + ("" if name is None else f", field '{name}'")
        message = f"{where}: {reason}"
        if not self.skip:
            raise RowError(f"{message}; mend it, or leave such rows out with benchmark.skip_bad_rows=true")
        log.warning("skipped %s", message)
        self.skipped.append(message)


def zip_member(path: Path, names: Sequence[str]) -> tuple[zipfile.ZipFile, str]:
    """An open zip file and the first of `names` in it.

    Raises:
        DataError: no zip file or a truncated one, or none of the names is in it.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is no whole zip file ({error}); get it again") from error
    inside = set(archive.namelist())
    for name in names:
        if name in inside:
            return archive, name
    archive.close()
    raise DataError(f"{path} holds none of {', '.join(names)}")
