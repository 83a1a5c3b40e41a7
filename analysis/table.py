"""One Markdown table of methods and budgets, read from the records, with what a reader must know below it.

`python -m analysis.table outputs/<tag> --budget f0.25` prints it; `--out FILE` writes it. Every figure is one
of the records; only ratios of two times are computed here, against fullkv of the same tag on the same device.
A cell that can't exist is a row that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from analysis import command
from analysis.cells import (
    BASELINE,
    Cell,
    by_label,
    commits,
    days,
    devices,
    listed,
    read,
    side_by_side,
    sizes,
    tasks,
)
from analysis.markdown import bullets, document, table

Column = tuple[str, Callable[[Cell], str]]
_UNITS = (("MiB", 1 << 20), ("KiB", 1 << 10), ("bytes", 1))


def markdown(cells: Sequence[Cell], order: Sequence[str] = ()) -> str:
    """The table and the lines below it.

    order: methods in the order of their rows, after fullkv; the others follow in alphabetical order.

    Raises:
        ValueError: no completed cell, cells of different settings, or a method in `order` without a cell.
    """
    rows = _rows(side_by_side(cells), order)
    columns = _columns([cell for _, cell in rows], cells)
    header = ["method", *(name for name, _ in columns)]
    fields = [[label, *(value(cell) for _, value in columns)] for label, cell in rows]
    return document([table(header, fields), bullets([*_legend(rows), *_notes(rows)])])


def at_budget(cells: Sequence[Cell], budget: str) -> list[Cell]:
    """The cells at a budget, given by its label (f0.25, t128), and those without one.

    Raises:
        ValueError: no cell has it.
    """
    known = sorted({cell.budget for cell in cells})
    if budget not in known:
        raise ValueError(f"--budget {budget}: no cell has this budget (there are: {', '.join(known)})")
    return [cell for cell in cells if cell.budget in (budget, "full")]


def _rows(cells: Sequence[Cell], order: Sequence[str]) -> list[tuple[str, Cell]]:
    rows = [(label, cell) for label, group in by_label(cells).items() for cell in group]
    known = sorted({cell.method for cell in cells})
    unknown = [name for name in order if name not in known]
    if unknown:
        raise ValueError(f"--order {unknown[0]}: no cell has this method (there are: {', '.join(known)})")
    place = {name: position for position, name in enumerate(dict.fromkeys((BASELINE, *order)))}
    return sorted(rows, key=lambda row: place.get(row[1].method, len(place)))


def _columns(shown: Sequence[Cell], cells: Sequence[Cell]) -> list[Column]:
    bases = {c.result["cell"]["tag"]: c for c in cells if c.method == BASELINE and c.completed}
    return [
        ("kept", lambda cell: cell.kept),
        *(_task_column(task, first=position == 0) for position, task in enumerate(tasks(shown))),
        ("resident", lambda cell: _format(_dig(cell, "budget", "resident_fraction"), ".3f")),
        ("attended", lambda cell: _format(_dig(cell, "budget", "attended_fraction"), ".3f")),
        _bytes_column(shown, "host {}", "memory", "host_kv_bytes"),
        _bytes_column(shown, "{} moved/token", "latency", "host_to_device_bytes_per_token"),
        ("prefill ms", _time(bases, "prefill_ms")),
        ("decode ms/token", _time(bases, "decode_ms_per_token")),
    ]


def _task_column(task: str, first: bool) -> Column:
    def value(cell: Cell) -> str:
        if not cell.completed:
            return cell.status if first else "-"
        found = cell.result["tasks"].get(task)
        if not found:
            return "-"
        if found["score"] is None or found["ci95"] is None:
            return "-" if found["score"] is None else _short(found["score"])
        low, high = (_short(bound) for bound in found["ci95"])
        return f"{_short(found['score'])} [{low}, {high}]"

    return task, value


def _bytes_column(cells: Sequence[Cell], header: str, *path: str) -> Column:
    """One unit for the whole column: the largest in which the largest value is at least 1."""
    largest = max((_dig(cell, *path) or 0.0 for cell in cells), default=0.0)
    unit, size = next((u for u in _UNITS if largest >= u[1]), _UNITS[-1])
    digits = ".0f" if size == 1 else ".2f"

    def value(cell: Cell) -> str:
        number = _dig(cell, *path)
        return "-" if number is None else "0" if number == 0 else format(number / size, digits)

    return header.format(unit), value


def _time(bases: Mapping[str, Cell], name: str) -> Callable[[Cell], str]:
    """A median time, and its ratio to the baseline's where the two were taken on one kind of device."""

    def value(cell: Cell) -> str:
        number = _dig(cell, "latency", name, "median")
        if number is None:
            return "-"
        base = bases.get(cell.result["cell"]["tag"])
        full = _dig(base, "latency", name, "median") if base and base.method != cell.method else None
        comparable = full and base and devices([base]) == devices([cell])
        return f"{number:.1f} ({number / full:.2f}x)" if full and comparable else f"{number:.1f}"

    return value


def _dig(cell: Cell, *path: str) -> float | None:
    """A measured number of a completed cell; None where there is none."""
    value = cell.result if cell.completed else None
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) else None


def _format(number: float | None, spec: str) -> str:
    return "-" if number is None else format(number, spec)


def _short(number: float) -> str:
    """One decimal, none for a whole number."""
    return f"{number:.0f}" if number == round(number) else f"{number:.1f}"


def _legend(rows: Sequence[tuple[str, Cell]]) -> list[str]:
    done = [cell for _, cell in rows if cell.completed]
    first = done[0].result["cell"]
    ratios = ", (x) against fullkv" if any(cell.method == BASELINE for cell in done) else ""
    return [
        f"{first['model']} on {first['benchmark']}, n = {sizes(done)} a task; scores 0 to 100 with 95% "
        "intervals.",
        "resident: KV bytes on the device over the full cache, measured after prefill; attended: share of "
        f"the prompt that a decode step reads; host: held per example; times: medians{ratios}.",
        *_where(done),
    ]


def _where(done: Sequence[Cell]) -> list[str]:
    """Device, days, versions and commit, and a warning where times don't come from one place and day."""
    places, started = devices(done), days(done)
    versions = dict.fromkeys(cell.versions for cell in done)
    lines = [
        f"Device: {'; '.join(places)}. Started: {', '.join(started)}.",
        f"Versions: {'; '.join(versions)}. Commit: {listed(commits(done))}.",
    ]
    if len(places) > 1:
        lines.append("Times were taken on different devices: no ratio is given across them.")
    if len(started) > 1:
        lines.append("Times were taken on different days: read their ratios with care.")
    return lines


def _notes(rows: Iterable[tuple[str, Cell]]) -> list[str]:
    """What a reader must know about single rows; a note of several budgets stands once."""
    found: dict[tuple[str, str], list[str]] = {}
    for label, cell in rows:
        notes = list(cell.result.get("notes", []))
        adjusted = _dig(cell, "budget", "adjusted_examples")
        if adjusted:
            notes.append(f"{adjusted:.0f} examples too short for the budget used the nearest feasible one")
        if cell.result["status"] == "failed":
            notes.append(f"failed: {cell.result['error']['message']}")
        for note in notes:
            found.setdefault((label, " ".join(note.split())), []).append(cell.kept)
    return [f"{label} at {', '.join(kept)}: {note}" for (label, note), kept in found.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = command.parser("table", __doc__)
    parser.add_argument("directory", type=Path, help="outputs/<tag>, or any directory above recorded cells")
    parser.add_argument("--budget", metavar="LABEL", help="only this budget, as in the records: f0.25, t128")
    parser.add_argument("--order", default="", metavar="A,B", help="methods in the order of their rows")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it; default: print it")
    asked = parser.parse_args(arguments)

    def show() -> None:
        cells = read([asked.directory])
        chosen = at_budget(cells, asked.budget) if asked.budget else cells
        command.tell(markdown(chosen, [name for name in asked.order.split(",") if name]), asked.out)

    return command.answered(show)


if __name__ == "__main__":
    sys.exit(main())
