"""The cells below a directory: reading `result.json`, what cells share, and how they are named side by side.

The one place of `analysis` that knows how records lie on disk. Never runs a model, computes no number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcache.records import PREDICTIONS_FILE, RESULT_FILE, SCHEMA, Line, Result, identity, setting

BASELINE = "fullkv"
"""The method that others are held against."""

_LISTED = 3


@dataclass(frozen=True)
class Cell:
    """A recorded cell: where it lies, and its record."""

    directory: Path
    result: Result

    @property
    def method(self) -> str:
        return str(self.result["cell"]["method"])

    @property
    def budget(self) -> str:
        """The budget's label: f0.25, t128, or full for a method without one."""
        return str(self.result["cell"]["budget"])

    @property
    def kept(self) -> str:
        """The budget as it was asked for, in words: 0.25, 128 tokens, all."""
        kind, value = self.budget[:1], self.budget[1:]
        return "all" if self.budget == "full" else f"{value} tokens" if kind == "t" else value

    @property
    def completed(self) -> bool:
        return bool(self.result["status"] == "completed")

    @property
    def smallest(self) -> str | None:
        """The smallest feasible budget of an infeasible cell, in the unit that was asked for."""
        error = self.result.get("error") or {}
        if "smallest_fraction" not in error:
            return None
        return f"{error['smallest_tokens']} tokens" if self._in_tokens else f"{error['smallest_fraction']:g}"

    @property
    def status(self) -> str:
        """completed, or why there are no numbers, with the budget that would do where that is known."""
        needs = f", needs >= {self.smallest}" if self.smallest else ""
        return f"{self.result['status']}{needs}"

    @property
    def versions(self) -> str:
        """Of the packages it ran on, with their names."""
        return ", ".join(f"{name} {v}" for name, v in self.result["provenance"]["versions"].items())

    @property
    def options(self) -> dict[str, str]:
        """Options of the method by dotted path, and the budget's unit, by which lines of a plot differ."""
        found = dict(_leaves(identity(self.result["config"])["method"]))
        found.pop("name", None)
        return {**found, "budget": "tokens" if self._in_tokens else "fraction"}

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts cells by requested budget."""
        return self._in_tokens, 1.0 if self.budget == "full" else float(self.budget[1:])

    @property
    def _in_tokens(self) -> bool:
        return self.budget.startswith("t")

    def lines(self) -> list[Line]:
        """The lines of its predictions.jsonl."""
        text = (self.directory / PREDICTIONS_FILE).read_text(encoding="utf-8")
        # Not splitlines: what models write holds other line ends, and they stand unescaped.
        return [json.loads(line) for line in text.split("\n") if line]


@dataclass(frozen=True)
class Unread:
    """A directory of a run that holds no record to read: it is still running, was stopped, or is damaged."""

    directory: Path
    reason: str


def read(directories: Iterable[Path]) -> list[Cell]:
    """All recorded cells below the directories, each once, in the order of their paths.

    Raises:
        ValueError: a directory without a record, or a record that can't be read.
    """
    found: dict[Path, Cell] = {}
    for directory in directories:
        paths = sorted(directory.rglob(RESULT_FILE))
        if not paths:
            raise ValueError(f"no {RESULT_FILE} below {directory}; give outputs/<tag> of a run")
        found.update({path.resolve(): Cell(path.parent, _record(path)) for path in paths})
    return list(found.values())


def survey(directories: Iterable[Path]) -> tuple[list[Cell], list[Unread]]:
    """As `read`, of a sweep that may be half finished: what can't be read is told apart from the cells.

    Raises:
        ValueError: a directory below which no run left anything.
    """
    cells: dict[Path, Cell] = {}
    unread: dict[Path, Unread] = {}
    for directory in directories:
        names = (RESULT_FILE, PREDICTIONS_FILE)
        places = sorted({path.parent for name in names for path in directory.rglob(name)})
        if not places:
            raise ValueError(f"no {RESULT_FILE} below {directory}; give outputs/<tag> of a run")
        for place in places:
            try:
                if (place / RESULT_FILE).exists():
                    cells[place.resolve()] = Cell(place, _record(place / RESULT_FILE))
                else:
                    unread[place.resolve()] = Unread(place, _stopped(place))
            except ValueError as error:
                unread[place.resolve()] = Unread(place, str(error))
    return list(cells.values()), list(unread.values())


def _stopped(place: Path) -> str:
    done = (place / PREDICTIONS_FILE).read_bytes().count(b"\n")
    return f"{done} examples are done and no record is written: still running, or stopped"


def completed(cells: Sequence[Cell]) -> Iterator[Cell]:
    """The completed ones; the others are named on stderr."""
    for cell in cells:
        if cell.completed:
            yield cell
        else:
            print(f"left out: {cell.directory} is {cell.result['status']}", file=sys.stderr)


def side_by_side(cells: Sequence[Cell]) -> list[Cell]:
    """The cells as they may be shown together, one for each configuration.

    Raises:
        ValueError: none is completed, or they differ in more than method and budget.
    """
    if not any(cell.completed for cell in cells):
        raise ValueError("no completed cell among the records: there is nothing to show")
    _one_setting(cells)
    return unique(cells)


def unique(cells: Sequence[Cell]) -> list[Cell]:
    """One cell for each configuration: of several runs of one the one with most examples, the others are
    named on stderr."""
    best: dict[str, Cell] = {}
    for cell in cells:
        known = best.setdefault(str(cell.result["config_hash"]), cell)
        if known is cell:
            continue
        less, more = sorted((known, cell), key=_examples)
        if _examples(less) == _examples(more):
            less, more = cell, known
        best[str(cell.result["config_hash"])] = more
        print(f"left out: {less.directory} is the same cell as {more.directory}", file=sys.stderr)
    return list(best.values())


def _one_setting(cells: Sequence[Cell]) -> None:
    """Check that all may stand side by side: the same but for method and budget.

    Raises:
        ValueError: naming what differs, and two cells that do.
    """
    for cell in cells[1:]:
        if setting(cell.result["config"]) != setting(cells[0].result["config"]):
            ours, theirs = shared(cells[0]), shared(cell)
            gaps = [
                f"{path} ({ours.get(path, '-')} and {theirs.get(path, '-')})"
                for path in sorted(ours.keys() | theirs.keys())
                if ours.get(path) != theirs.get(path)
            ]
            raise ValueError(
                f"{cells[0].directory} and {cell.directory} can't stand side by side, they differ in "
                f"{', '.join(gaps)}; give directories of one setting"
            )


def by_label(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells of each method, or of each setting of its options where one was run with several, sorted by
    requested budget. Labels are the method's name with the options that differ; the baseline comes first,
    then the alphabet."""
    groups: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.method != BASELINE, cell.method, cell.order)):
        options = cell.options
        same = [other.options for other in cells if other.method == cell.method]
        shown = [
            f"{path}={value[:8] if path in ('content', 'source') else value}"
            for path, value in sorted(options.items())
            if any(other.get(path) != value for other in same)
            and not (path in ("content", "source") and value == "None")
        ]
        groups.setdefault(f"{cell.method} ({', '.join(shown)})" if shown else cell.method, []).append(cell)
    return groups


def tasks(cells: Sequence[Cell]) -> list[str]:
    """Names of all tasks, in the order of the records."""
    return list(dict.fromkeys(task for cell in cells for task in cell.result.get("tasks", {})))


def sizes(cells: Sequence[Cell]) -> str:
    """Examples a task and cell: `100`, or `20 to 100`."""
    found = sorted({task["n"] for cell in cells for task in cell.result.get("tasks", {}).values()})
    return " to ".join(str(n) for n in dict.fromkeys((found[0], found[-1]))) if found else "0"


def devices(cells: Sequence[Cell]) -> list[str]:
    """Where the cells ran, each once."""
    return list(dict.fromkeys(str(cell.result["provenance"]["device"]) for cell in cells))


def days(cells: Sequence[Cell]) -> list[str]:
    """The days on which the cells were started, in their order."""
    return sorted({str(cell.result["provenance"]["started"])[:10] for cell in cells})


def commits(cells: Sequence[Cell]) -> list[str]:
    """Short git commits the cells ran at, each once, with a word where files differed from the commit."""
    found = (cell.result["provenance"] for cell in cells)
    names = ((str(p["git"])[:7] if p["git"] else "unknown", bool(p["dirty"])) for p in found)
    return list(dict.fromkeys(f"{name} with local changes" if dirty else name for name, dirty in names))


def listed(names: Sequence[str]) -> str:
    """Up to three names, and a word for more."""
    return ", ".join(names[:_LISTED]) + (" and others" if len(names) > _LISTED else "")


def short_tokens(count: int) -> str:
    """32K for 32768."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _record(path: Path) -> Result:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or "cell" not in result:
            raise ValueError("it is no record of a cell")
    except ValueError as error:
        raise ValueError(f"{path} can't be read ({error}); move it away and run its cell again") from error
    if result.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"{path} has schema {result['schema']!r}, this version reads {SCHEMA}")
    return result


def _examples(cell: Cell) -> int:
    return sum(task["n"] for task in cell.result.get("tasks", {}).values()) if cell.completed else -1


def shared(cell: Cell) -> dict[str, str]:
    """What cells that stand side by side have in common, by dotted path."""
    return dict(_leaves({**identity(cell.result["config"]), "method": {}, "budget": None}))


def _leaves(part: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every option below `part` with its dotted path, as text."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(part)
