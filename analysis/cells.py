"""The cells below a directory: reading `result.json`, what cells share, and how they are named side by side.

The one place of `analysis` that knows how records lie on disk. Never runs a model, computes no number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcache.records import PREDICTIONS_FILE, RESULT_FILE, SCHEMA, Line, Result, identity, setting

BASELINE = "fullkv"
"""The method that others are held against."""

_LISTED = 3
_DIGESTS = ("content", "source")  # options of a method that are digests of files
_SECTIONS = {"model", "method", "benchmark", "budget", "runtime"}


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
        return f"{error['smallest_tokens']} tokens" if self.in_tokens else f"{error['smallest_fraction']:g}"

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
        found = dict(leaves(identity(self.result["config"])["method"]))
        found.pop("name", None)
        return {**found, "budget": "tokens" if self.in_tokens else "fraction"}

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts cells by requested budget."""
        return self.in_tokens, 1.0 if self.budget == "full" else float(self.budget[1:])

    @property
    def in_tokens(self) -> bool:
        """Whether the budget was asked for in tokens."""
        return self.budget.startswith("t")

    @property
    def has_lines(self) -> bool:
        """Whether its predictions lie beside its record; those of some libraries never do."""
        return (self.directory / PREDICTIONS_FILE).exists()

    def lines(self) -> list[Line]:
        """The lines of its predictions.jsonl; what is no line of an example is named on stderr."""
        return lines(self.directory / PREDICTIONS_FILE)


@dataclass(frozen=True)
class Unread:
    """A directory without a record to read. status: unfinished, or unreadable."""

    directory: Path
    status: str
    reason: str


def read(directories: Iterable[Path | str] | Path | str) -> list[Cell]:
    """All recorded cells below the directories, each once, in the order of their paths. Files that are torn
    or of another program are named on stderr and left out.

    directories: one, or several.

    Raises:
        ValueError: a directory without a record that can be read.
    """
    found: dict[Path, Cell] = {}
    for directory in map(Path, [directories] if isinstance(directories, Path | str) else directories):
        own = [(path, _record(path)) for path in sorted(directory.rglob(RESULT_FILE))]
        known = {path.resolve(): Cell(path.parent, record) for path, record in own if record is not None}
        if not known:
            said = f"no {RESULT_FILE} below {directory}{' can be read' if own else ''}"
            raise ValueError(f"{said}; give outputs/<tag> of a run")
        found |= known
    return list(found.values())


def survey(directories: Iterable[Path]) -> tuple[list[Cell], list[Unread]]:
    """As `read`, of a sweep that may be half finished: directories without a record to read come apart.

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
            found = _surveyed(place)
            if isinstance(found, Cell):
                cells[place.resolve()] = found
            else:
                unread[place.resolve()] = found
    return list(cells.values()), list(unread.values())


def _surveyed(place: Path) -> Cell | Unread:
    if not (place / RESULT_FILE).exists():
        done = (place / PREDICTIONS_FILE).read_bytes().count(b"\n")
        reason = f"{done} examples are done and no record is written: still running, or stopped"
        return Unread(place, "unfinished", reason)
    record, reason = _reading(place / RESULT_FILE)
    return Unread(place, "unreadable", f"{RESULT_FILE} {reason}") if record is None else Cell(place, record)


def unfinished(directories: Iterable[Path]) -> list[Path]:
    """Directories of cells that have lines but no record yet, in the order of their paths."""
    found = {path.parent for where in directories for path in where.rglob(PREDICTIONS_FILE)}
    return sorted(path for path in found if not (path / RESULT_FILE).exists())


def lines(path: Path) -> list[Line]:
    """The lines of a predictions.jsonl; others, such as one that is being written, are named on stderr."""
    found = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            line, reason = None, str(error)
        else:
            reason = "it has no task, id and score"
        if isinstance(line, dict) and {"task", "id", "score"} <= line.keys():
            found.append(line)
        else:
            print(f"left out: line {number} of {path}: {reason}", file=sys.stderr)
    return found


def completed(cells: Sequence[Cell]) -> Iterator[Cell]:
    """The completed ones; the others are named on stderr."""
    for cell in cells:
        if cell.completed:
            yield cell
        else:
            print(f"left out: {cell.directory} is {cell.result['status']}", file=sys.stderr)


def side_by_side(cells: Sequence[Cell], seeds: bool = False) -> list[Cell]:
    """The cells as they may be shown together, one for each configuration.

    seeds: seeds may differ too; whoever shows the cells joins them (analysis.seeds).

    Raises:
        ValueError: none is completed, or they differ in more than method and budget.
    """
    if not any(cell.completed for cell in cells):
        raise ValueError("no completed cell among the records: there is nothing to show")
    _one_setting(cells, seeds)
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


def family(cell: Cell) -> str:
    """What cells share that differ in method, budget and seeds alone, as a digest."""
    return setting(_seedless(cell.result["config"]))


def shared(cell: Cell) -> dict[str, str]:
    """The options that make a cell's family, by dotted path."""
    return _shared(_seedless(cell.result["config"]))


def _seedless(config: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        section: {key: value for key, value in config[section].items() if key != "seed"}
        for section in ("benchmark", "runtime")
    }
    return {**config, **own}


def _one_setting(cells: Sequence[Cell], seeds: bool) -> None:
    """Check that all may stand side by side: the same but for method and budget.

    Raises:
        ValueError: naming what differs, and two cells that do.
    """
    configs = [_seedless(cell.result["config"]) if seeds else cell.result["config"] for cell in cells]
    for cell, config in zip(cells[1:], configs[1:], strict=True):
        if setting(config) != setting(configs[0]):
            ours, theirs = _shared(configs[0]), _shared(config)
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
    settings = [(cell, cell.options) for cell in cells]
    known: dict[str, dict[str, set[str | None]]] = {}
    for cell, options in settings:
        for path in options:
            known.setdefault(cell.method, {}).setdefault(path, set())
    for cell, options in settings:
        for path, values in known[cell.method].items():
            values.add(options.get(path))
    settings.sort(key=lambda of: (of[0].method != BASELINE, of[0].method, of[0].order))
    for cell, options in settings:
        shown = [
            f"{path}={value[:8] if path in _DIGESTS else value}"
            for path, value in sorted(options.items())
            if len(known[cell.method][path]) > 1 and not (path in _DIGESTS and value == "None")
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


def _record(path: Path) -> Result | None:
    """The record of a cell; None where there is none, and the file is named on stderr."""
    record, reason = _reading(path)
    if record is None:
        print(f"left out: {path} {reason}", file=sys.stderr)
    return record


def _reading(path: Path) -> tuple[Result | None, str]:
    """The record of a cell, or why there is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, f"can't be read ({error}); run its cell again"
    reason = _foreign(result)
    return (None, reason) if reason else (result, "")


def _foreign(result: Any) -> str:
    """Why this is no record that this version reads; empty if it is one."""
    if not isinstance(result, dict) or not {"status", "cell", "config"} <= result.keys():
        return "is no record of a cell"
    cell, config = result["cell"], result["config"]
    if not isinstance(cell, dict) or not {"method", "budget"} <= cell.keys():
        return "names no method and budget"
    if not isinstance(config, dict) or not config.keys() >= _SECTIONS:
        return "has no whole configuration"
    known = result.get("schema", SCHEMA)
    return "" if known == SCHEMA else f"has schema {known!r}, this version reads {SCHEMA}"


def _examples(cell: Cell) -> int:
    return sum(task["n"] for task in cell.result.get("tasks", {}).values()) if cell.completed else -1


def _shared(config: Mapping[str, Any]) -> dict[str, str]:
    return dict(leaves({**identity(config), "method": {}, "budget": None}))


def leaves(part: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every option below `part` with its dotted path, as text."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(part)
