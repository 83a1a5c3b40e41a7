"""One Markdown table of methods and budgets, read from the records, with what a reader must know below it.

`python -m analysis.table outputs/<tag> --budget f0.25` prints it; `--out FILE` writes it. Every figure is one
of the records; computed are ratios of two times, against fullkv of the same tag on the same device, and the
interval of all tasks, from theirs.
A cell that can't exist is a row that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
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
from analysis.columns import columns, dig
from analysis.markdown import bullets, document, table


def markdown(cells: Sequence[Cell], order: Sequence[str] = ()) -> str:
    """The table and the lines below it.

    order: methods in the order of their rows, after fullkv; the others follow in alphabetical order.

    Raises:
        ValueError: no completed cell, cells of different settings, or a method in `order` without a cell.
    """
    rows = _rows(side_by_side(cells), order)
    shown = columns([cell for _, cell in rows], cells)
    header = ["method", *(column.name for column in shown)]
    fields = [[label, *(column.field(cell).whole for column in shown)] for label, cell in rows]
    return document([table(header, fields), bullets([*legend(rows), *notes(rows)])])


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


def legend(rows: Sequence[tuple[str, Cell]]) -> list[str]:
    """What was run, what the headings mean, and where it was measured."""
    done = [cell for _, cell in rows if cell.completed]
    first = done[0].result["cell"]
    ratios = ", (x) against fullkv" if any(cell.method == BASELINE for cell in done) else ""
    return [
        f"{first['model']} on {first['benchmark']}, n = {sizes(done)} a task; scores 0 to 100 with 95% "
        f"intervals{', that of all tasks from theirs' if len(tasks(done)) > 1 else ''}.",
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


def notes(rows: Iterable[tuple[str, Cell]]) -> list[str]:
    """What a reader must know about single rows; a note of several budgets stands once."""
    found: dict[tuple[str, str], list[str]] = {}
    for label, cell in rows:
        said = list(cell.result.get("notes", []))
        adjusted = dig(cell, "budget", "adjusted_examples")
        if adjusted:
            said.append(f"{adjusted:.0f} examples too short for the budget used the nearest feasible one")
        if cell.result["status"] == "failed":
            said.append(f"failed: {cell.result['error']['message']}")
        for note in said:
            found.setdefault((label, " ".join(note.split())), []).append(cell.kept)
    return [f"{label} at {', '.join(dict.fromkeys(kept))}: {note}" for (label, note), kept in found.items()]


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
