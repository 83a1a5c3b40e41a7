"""Where a benchmark's files come from, and how rows are read from them.

A file is looked for in `data_dir`, then in `data/<benchmark>/` below the working directory, then on the Hub
at a pinned revision, where it is downloaded once into the Hub's own cache. Rows are read one by one; one that
is broken is an error that names file, line and field, or is counted where `skip_bad_rows` says so. Knows no
benchmark by name.
"""

from __future__ import annotations

import json
import logging
import re
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
        revision: a commit, whole or its first digits, or a branch.
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
            return Path(hf_hub_download(self.repo, filename, repo_type="dataset", revision=self.commit()))
        except (OSError, ValueError) as error:  # huggingface_hub's errors are of these kinds
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"{filename} of {self.repo} can't be downloaded ({type(error).__name__}: {reason}); run "
                "runner=fetch where there is a network, or set benchmark.data_dir to where it lies"
            ) from error

    def commit(self) -> str:
        """The whole hash where the revision is the beginning of one: by the cache, else by the Hub.

        Raises:
            ValueError: the repository has no such commit.
            OSError: the Hub can't be reached.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_CACHE

        if not re.fullmatch(r"[0-9a-f]{7,39}", self.revision):
            return self.revision
        snapshots = Path(HF_HUB_CACHE) / f"datasets--{self.repo.replace('/', '--')}" / "snapshots"
        known = [path.name for path in snapshots.glob(f"{self.revision}*")]
        known = known or [c.commit_id for c in HfApi().list_repo_commits(self.repo, repo_type="dataset")]
        found = [commit for commit in known if commit.startswith(self.revision)]
        if not found:
            raise ValueError(
                f"{self.repo} has no commit {self.revision}; set benchmark.revision to one it has"
            )
        return found[0]


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
