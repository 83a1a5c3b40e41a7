"""All that a report shows, read and computed once: families with their findings, and what has no numbers.

Reads outputs/ through analysis.cells; knows no format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.cells import BASELINE, Cell, Unread, survey
from analysis.disagreements import Chosen, chosen
from analysis.families import Family, families
from analysis.findings import Finding, findings
from analysis.gaps import Gaps, gaps
from analysis.latency_records import Sweep, place_shown, sweeps


@dataclass(frozen=True)
class Section:
    """A family, and what is said about it.

    Args:
        gaps: differences to the method that others are held against; empty, and why in `without_gaps`.
        examples: on which methods disagree.
    """

    family: Family
    findings: Sequence[Finding]
    gaps: Gaps
    without_gaps: str
    examples: Chosen


@dataclass(frozen=True)
class Lost:
    """A cell without numbers.

    Args:
        status: infeasible, failed, unfinished or unreadable.
        trace: where it failed, if that is known.
    """

    name: str
    status: str
    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Report:
    """title: the directories; latency: the cells of runner=latency, which are in no section."""

    title: str
    sections: Sequence[Section]
    lost: Sequence[Lost]
    latency: Sequence[Sweep]

    @property
    def cells(self) -> list[Cell]:
        """Every recorded one."""
        scored = [cell for section in self.sections for cell in section.family.cells]
        return [*scored, *(cell for sweep in self.latency for cell in sweep.cells)]

    @property
    def counts(self) -> str:
        """How many cells there are of each kind."""
        kinds = [lost.status.split(",")[0] for lost in self.lost]
        done = sum(cell.completed for cell in self.cells)
        found = {"completed": done, **{kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}}
        return ", ".join(f"{number} {kind}" for kind, number in found.items())


def gather(directories: Sequence[Path], against: str = BASELINE, examples: int = 8) -> Report:
    """Read what lies below the directories.

    against: the method that others are held against. examples: of each family at most.

    Raises:
        ValueError: a directory below which no run left anything.
    """
    cells, unread = survey(directories)
    latency = sweeps(cells)
    timed = {id(cell) for sweep in latency for cell in sweep.cells}
    own = families([cell for cell in cells if id(cell) not in timed])
    return Report(
        ", ".join(str(directory) for directory in directories),
        [_section(family, against, examples) for family in own],
        [*_without_numbers(own), *_unmeasured(latency), *map(_unfinished, unread)],
        latency,
    )


def _section(family: Family, against: str, examples: int) -> Section:
    scored = [cell for cell in family.done if cell.has_lines]
    try:
        found, reason = gaps(scored, against), ""
    except ValueError as error:
        found, reason = Gaps(), f"No paired comparison: {error}."
    return Section(family, findings(family, found.headline), found, reason, chosen(family, examples))


def _without_numbers(own: Iterable[Family]) -> list[Lost]:
    return [
        _lost(family, label, cell) for family in own for label, cell in family.labelled if not cell.completed
    ]


def _unmeasured(latency: Iterable[Sweep]) -> Iterator[Lost]:
    """Cells of runner=latency without any point, and points without numbers."""
    for sweep in latency:
        for cell in sweep.cells:
            if not cell.completed and not cell.result["latency"]["points"]:
                yield _named(f"{cell.method}, {cell.kept} kept: {sweep.name}", cell)
        for line in sweep.lines:
            for place, point in sorted(line.points.items()):
                if point["status"] != "completed":
                    name = f"{line.label}, {line.kept} kept, {place_shown(place)}: {sweep.name}"
                    yield Lost(name, point["status"].replace("_", " "), str(point.get("message", "")))


def _lost(family: Family, label: str, cell: Cell) -> Lost:
    return _named(f"{label}, {cell.kept} kept{family.seed(cell)}: {family.name}", cell)


def _named(name: str, cell: Cell) -> Lost:
    error = cell.result.get("error") or {}
    reason = str(error.get("message", "the record gives no reason"))
    return Lost(name, cell.status, reason, str(error.get("traceback", "")))


def _unfinished(unread: Unread) -> Lost:
    return Lost(str(unread.directory), unread.status, unread.reason)
