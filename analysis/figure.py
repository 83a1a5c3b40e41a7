"""All figures by name: `python -m analysis.figure NAME outputs/a outputs/b --out fig.pdf`.

The suffix decides the format (pdf and svg are vectors; fonts of a pdf are TrueType). The numbers lie beside
the figure as CSV. `--width one` or `two` draws it for one or two columns of a paper, 3.3 or 6.9 inches, and
writes what the caption must say beside it; without it the figure is as wide as a page, and says it at its
foot. The same records give the same files. Reads what runs left; never runs a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import command, drawing, drift, heatmap, kept, latency, pareto, roles, task_map
from analysis.cells import Cell, read
from analysis.drawing import COLUMN, Picture

Options = dict[str, dict[str, Any]]
"""Of a figure's own command line: arguments of add_argument by flag."""


@dataclass(frozen=True)
class Figure:
    """What a name stands for.

    Args:
        about: one line.
        picture: makes it from the cells and what was asked.
        options: of its own.
    """

    about: str
    picture: Callable[[Sequence[Cell], argparse.Namespace], Picture]
    options: Options


_TASKS: Options = {
    "--task": {
        "action": "append",
        "default": [],
        "help": f"only this task, or {pareto.TOGETHER}; may be repeated",
    }
}
_COST: Options = {
    "--x": {"choices": ("resident", "attended", "time"), "default": "resident", "help": "what is paid"}
}
_EXAMPLE: Options = {
    "--example": {"metavar": "TASK/ID", "help": "a traced example; default: the first that all cells have"}
}
FIGURES = {
    "pareto": Figure(
        "score against bytes or time, one line a method, and the front of all",
        lambda cells, asked: pareto.picture(cells, asked.task, asked.x),
        {**_TASKS, **_COST},
    ),
    "budgets": Figure(
        "score against the budget asked for, with intervals over the examples of all seeds",
        lambda cells, asked: pareto.budgets(cells, asked.task),
        _TASKS,
    ),
    "tasks": Figure(
        "score of each method (down) on each task (across)",
        lambda cells, asked: task_map.picture(cells),
        {},
    ),
    "needle": Figure(
        "length by depth, a panel for each method and budget (analysis.heatmap writes its tables)",
        lambda cells, asked: heatmap.picture(cells),
        {},
    ),
    "latency": Figure(
        "decode time against context (analysis.latency writes its tables)",
        lambda cells, asked: latency.picture(cells),
        {},
    ),
    "drift": Figure(
        "overlaps and refreshes while one answer was decoded (heterocache, runner.trace)",
        lambda cells, asked: drift.picture(cells, asked.example),
        _EXAMPLE,
    ),
    "kept": Figure(
        "which positions of one prompt each method kept (runner.trace)",
        lambda cells, asked: kept.picture(cells, asked.example),
        _EXAMPLE,
    ),
    "roles": Figure(
        "roles of heads by layer (heterocache, runner.trace)",
        lambda cells, asked: roles.picture(cells, asked.example),
        _EXAMPLE,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = command.parser("figure", __doc__)
    names = parser.add_subparsers(dest="figure", required=True, metavar="NAME")
    for name, figure in FIGURES.items():
        asking = names.add_parser(name, help=figure.about, description=figure.about)
        asking.add_argument("directories", type=Path, nargs="+", help=command.DIRECTORIES)
        asking.add_argument("--out", type=Path, required=True, metavar="FILE", help="a png, pdf or svg file")
        asking.add_argument("--width", choices=tuple(COLUMN), default="page", help="columns of a paper")
        for flag, settings in figure.options.items():
            asking.add_argument(flag, **settings)
    asked = parser.parse_args(arguments)

    def show() -> None:
        drawing.check(asked.out)
        drawing.save(FIGURES[asked.figure].picture(read(asked.directories), asked), asked.out, asked.width)

    return command.answered(show)


if __name__ == "__main__":
    sys.exit(main())
