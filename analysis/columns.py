"""The columns of a table of cells: every field holds the record's own number beside the text that shows it.
Computed here are ratios of times, and the interval of all tasks (analysis.seeds).

The one place that decides how a number is written, so that every format says the same. Knows no format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.cells import BASELINE, Cell, devices, tasks
from analysis.seeds import TOGETHER, total
from hcache.records import setting

_UNITS = (("MiB", 1 << 20), ("KiB", 1 << 10), ("bytes", 1))


@dataclass(frozen=True)
class Field:
    """What stands in one place of a table.

    Args:
        text: as it is shown.
        value: the record's number, unrounded; None where `text` is no number.
        aside: what follows the text: an interval, or the ratio to the baseline.
    """

    text: str = "-"
    value: float | None = None
    aside: str = ""

    @property
    def is_interval(self) -> bool:
        """Whether `aside` is one."""
        return self.aside.startswith("[")

    @property
    def whole(self) -> str:
        """All that is shown."""
        return f"{self.text} {self.aside}".rstrip()


@dataclass(frozen=True)
class Column:
    """A heading, and the field of a cell below it.

    Args:
        is_score: of a task: higher is better, and `aside` is a 95% interval.
    """

    name: str
    field: Callable[[Cell], Field]
    is_score: bool = False


def columns(shown: Sequence[Cell], cells: Sequence[Cell], together: bool = False) -> list[Column]:
    """All columns behind the method's name, for the cells shown.

    cells: where the baseline of the times is looked for. together: with the average of several tasks.
    """
    bases = {_run(cell): cell for cell in cells if cell.method == BASELINE and cell.completed}
    names = tasks(shown)
    scores = [_task(task, first=position == 0) for position, task in enumerate(names)]
    average = [Column(TOGETHER, _average, is_score=True)] if together and len(names) > 1 else []
    return [
        Column("kept", lambda cell: Field(cell.kept, cell.order[1])),
        *scores,
        *average,
        Column("resident", lambda cell: _number(cell, ".3f", "budget", "resident_fraction")),
        Column("attended", lambda cell: _number(cell, ".3f", "budget", "attended_fraction")),
        _bytes(shown, "host {}", "memory", "host_kv_bytes"),
        _bytes(shown, "{} moved/token", "latency", "host_to_device_bytes_per_token"),
        Column("prefill ms", _time(bases, "prefill_ms")),
        Column("decode ms/token", _time(bases, "decode_ms_per_token")),
    ]


def _task(task: str, first: bool) -> Column:
    def field(cell: Cell) -> Field:
        if not cell.completed:
            return Field(cell.status if first else "-")
        return _score((cell.result.get("tasks") or {}).get(task))

    return Column(task, field, is_score=True)


def _average(cell: Cell) -> Field:
    """The record's score of all tasks, with an interval where it has one (analysis.seeds)."""
    found = total([cell])
    if found.mean != found.mean:
        return Field()
    interval = None if found.low != found.low else (found.low, found.high)
    return _score({"score": found.mean, "ci95": interval})


def _score(found: Mapping[str, Any] | None) -> Field:
    if not found or found["score"] is None:
        return Field()
    interval = found.get("ci95")
    aside = f"[{short(interval[0])}, {short(interval[1])}]" if interval else ""
    return Field(short(found["score"]), found["score"], aside)


def _number(cell: Cell, spec: str, *path: str) -> Field:
    number = dig(cell, *path)
    return Field() if number is None else Field(format(number, spec), number)


def _bytes(cells: Sequence[Cell], header: str, *path: str) -> Column:
    """One unit for the whole column: the largest in which the largest value is at least 1."""
    largest = max((dig(cell, *path) or 0.0 for cell in cells), default=0.0)
    unit, size = next((u for u in _UNITS if largest >= u[1]), _UNITS[-1])
    digits = ".0f" if size == 1 else ".2f"

    def field(cell: Cell) -> Field:
        number = dig(cell, *path)
        if number is None:
            return Field()
        return Field("0" if number == 0 else format(number / size, digits), number)

    return Column(header.format(unit), field)


def _run(cell: Cell) -> tuple[str, str]:
    """What two cells share whose times may be held against each other: their tag and setting."""
    return str(cell.result["cell"]["tag"]), setting(cell.result["config"])


def _time(bases: Mapping[tuple[str, str], Cell], name: str) -> Callable[[Cell], Field]:
    """A median time, and its ratio to the baseline's where the two were taken on one kind of device."""

    def field(cell: Cell) -> Field:
        number = dig(cell, "latency", name, "median")
        if number is None:
            return Field()
        base = bases.get(_run(cell))
        full = dig(base, "latency", name, "median") if base and base.method != cell.method else None
        comparable = full and base and devices([base]) == devices([cell])
        ratio = f"({number / full:.2f}x)" if full and comparable else ""
        return Field(f"{number:.1f}", number, ratio)

    return field


def dig(cell: Cell, *path: str) -> float | None:
    """A measured number of a completed cell; None where there is none."""
    value = cell.result if cell.completed else None
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) else None


def short(number: float) -> str:
    """One decimal, none for a whole number (but for what a sum's rounding leaves)."""
    return f"{number:.0f}" if abs(number - round(number)) < 1e-9 else f"{number:.1f}"
