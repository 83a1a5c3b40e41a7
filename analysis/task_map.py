"""The score of each method on each task as one grid: methods and budgets down, tasks across.

`python -m analysis.figure tasks outputs/<tag> --out tasks.pdf`. Cells that differ in seeds alone are one row
(analysis.seeds). A task without a score is a gap: grey and hatched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from analysis import drawing, fields
from analysis.cells import Cell, by_label, commits, devices, listed, side_by_side, sizes, tasks
from analysis.drawing import Picture
from analysis.seeds import Score, by_budget, score, seeds, total

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOGETHER = "all"
_ROW = 0.2  # inches
_CHARACTER = 0.064  # inches of a row's or task's name


def picture(cells: Sequence[Cell]) -> Picture:
    """The grid of these cells.

    Raises:
        ValueError: no completed cell, or cells that differ in more than method, budget and seeds.
    """
    cells = side_by_side(cells, seeds=True)
    names = tasks(cells)
    groups = [(label, group) for label, own in by_label(cells).items() for group in by_budget(own)]
    rows = {_row(label, group): _scores(group, names) for label, group in groups}

    def draw(width: float, foot: Sequence[str]) -> Figure:
        return _draw(rows, [*names, TOGETHER], width, foot)

    return Picture(draw, _data(groups, names), [_gaps(groups), _caption(cells)])


def _row(label: str, group: Sequence[Cell]) -> str:
    return label if group[0].budget == "full" else f"{label}, {group[0].kept}"


def _scores(group: Sequence[Cell], names: Sequence[str]) -> list[float]:
    return [*(score(group, name).mean for name in names), total(group).mean]


def _draw(rows: dict[str, list[float]], names: Sequence[str], width: float, foot: Sequence[str]) -> Figure:
    left = 0.15 + _CHARACTER * max(len(name) for name in rows)
    top, bottom = 0.2 + 0.75 * _CHARACTER * max(len(name) for name in names), drawing.foot_inches(foot) + 0.08
    height = top + bottom + _ROW * len(rows)
    figure = drawing.sheet(width, height)
    axis = figure.subplots()
    right = 1 - 0.75 / width
    figure.subplots_adjust(left=left / width, right=right, top=1 - top / height, bottom=bottom / height)
    scores = list(rows.values())
    fields.grid(axis, scores)
    if (width - left - 0.75) / len(names) >= fields.NUMBER[0]:
        fields.numbers(axis, scores)
    axis.axvline(len(names) - 1.5, color="white", linewidth=2)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelsize=fields.TEXT - 1)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="left", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), list(rows))
    fields.scale(figure, bottom, top)
    drawing.write_foot(figure, foot)
    return figure


def _data(groups: Sequence[tuple[str, Sequence[Cell]]], names: Sequence[str]) -> pd.DataFrame:
    rows = []
    for label, group in groups:
        who = {"label": label, "method": group[0].method, "kept": group[0].kept}
        found: dict[str, Score] = {name: score(group, name) for name in names}
        for name, own in {**found, TOGETHER: total(group)}.items():
            numbers = {"score": own.mean, "low": own.low, "high": own.high, "n": own.n}
            rows.append({**who, "task": name, **numbers})
    return pd.DataFrame(rows)


def _gaps(groups: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    missing = [(_row(label, group), cell) for label, group in groups for cell in group if not cell.completed]
    return "; ".join(dict.fromkeys(f"{name}: {cell.status}" for name, cell in missing))


def _caption(cells: Sequence[Cell]) -> str:
    done = [cell for cell in cells if cell.completed]
    cell, several = done[0].result["cell"], seeds(done).replace("a point", "a row")
    return (
        f"{cell['model']} on {cell['benchmark']}, n = {sizes(done)} a task and cell"
        f"{f', {several}' if several else ''}; {listed(devices(done))}; commit {listed(commits(done))}. "
        "Hatched fields have no score."
    )
