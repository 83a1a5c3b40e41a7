"""Which method leads? Paired differences on the same examples, each against one method.

`python -m analysis.compare outputs/<tag> --against heterocache` prints, for every other cell with the same
model, benchmark and settings, at the same budget or without one, the difference of the mean scores with its
bootstrap interval, on how many examples the method wins, ties and loses, a sign-flip p-value, and the same
corrected for the number of rows (analysis.statistics). Where there are several tasks, a table of all their
examples together comes first, with a correction of its own: fewer comparisons of more examples. Every example
counts alike there, so with tasks of unequal size it is no difference of the benchmark's averages. Cells that
are not complete are named and left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis import command, frame
from analysis.cells import completed, read, unique
from analysis.statistics import comparisons, pooled


def compared(examples: pd.DataFrame, method: str) -> list[pd.DataFrame]:
    """`comparisons` of all examples, if there are several tasks, and of each task. Errors as there."""
    by_task = comparisons(examples, method)
    return [by_task] if by_task["task"].nunique() < 2 else [comparisons(pooled(examples), method), by_task]


def table(compared: pd.DataFrame, method: str) -> Table:
    """The rows of `comparisons` for a console."""
    title = f"{method} minus another method, paired, in points; p (Holm) of {len(compared)} comparisons"
    shown = Table(title=title, title_justify="left")
    for header in ("method", "against", "task", "n", "difference [95%]", "win/tie/loss", "p", "p (Holm)"):
        shown.add_column(header, no_wrap=True)
    for row in compared.itertuples():
        shown.add_row(
            f"{row.ours} {row.ours_budget}",
            f"{row.other} {row.other_budget}",
            str(row.task),
            str(row.n),
            f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]",
            f"{row.wins}/{row.ties}/{row.losses}",
            f"{row.p:.2g}",
            f"{row.p_holm:.2g}",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = command.parser("compare", __doc__)
    parser.add_argument("directories", type=Path, nargs="+", help=command.DIRECTORIES)
    parser.add_argument("--against", required=True, metavar="METHOD", help="the method others are taken from")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the numbers as a csv file")
    asked = parser.parse_args(arguments)

    def show() -> None:
        cells = unique(list(completed(read(asked.directories))))
        found = compared(frame.examples(cells), asked.against)
        if asked.out is not None:
            command.tell(pd.concat(found).to_csv(index=False), asked.out)
        for one in found:
            Console(width=160).print(table(one, asked.against))

    return command.answered(show)


if __name__ == "__main__":
    sys.exit(main())
