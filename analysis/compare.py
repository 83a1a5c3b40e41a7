"""Which method leads? Paired differences on the same examples, each against one method.

`python -m analysis.compare outputs/<tag> --against heterocache` prints, for every other cell with the same
model, benchmark and settings, at the same budget or without one, the difference of the mean scores with its
bootstrap interval and a sign-flip p-value (hcache.metrics). Cells that are not complete are named and left
out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from analysis import command
from analysis.cells import completed, read
from hcache.metrics import Comparison, paired_bootstrap
from hcache.records import setting


@dataclass(frozen=True)
class Finished:
    """A completed cell: who it is, what it shares with others that may be compared (records.setting), and
    score (0 to 1) by task and example id."""

    cell: dict[str, Any]
    setting: str
    scores: dict[str, dict[str, float]]

    @property
    def label(self) -> str:
        """Method and budget."""
        return f"{self.cell['method']} {self.cell['budget']}"


def finished(directory: Path) -> Iterator[Finished]:
    """The completed cells below a directory, in the order of their paths."""
    for cell in completed(read([directory])):
        scores: dict[str, dict[str, float]] = {}
        for line in cell.lines():
            if line["score"] is not None:  # a metric of whole tasks has no score of one example
                scores.setdefault(line["task"], {})[line["id"]] = line["score"]
        yield Finished(cell.result["cell"], setting(cell.result["config"]), scores)


def differences(ours: Finished, other: Finished, seed: int = 0) -> dict[str, tuple[int, Comparison]]:
    """For each task of both: how many examples, and ours minus the other's on them, in points of 100.

    Raises:
        ValueError: the two ran on different examples.
    """
    found = {}
    for task in ours.scores.keys() & other.scores.keys():
        mine, theirs = ours.scores[task], other.scores[task]
        if mine.keys() != theirs.keys():
            raise ValueError(
                f"{ours.label} and {other.label} ran on different examples of {task}; "
                "run both to the same limit"
            )
        pairs = [(100 * mine[name], 100 * theirs[name]) for name in sorted(mine)]
        a, b = zip(*pairs, strict=True)
        found[task] = (len(pairs), paired_bootstrap(a, b, seed))
    return dict(sorted(found.items()))


def table(cells: Sequence[Finished], method: str) -> Table:
    """One row for each other cell and task. Raises ValueError if no cell has the method."""
    ours = [cell for cell in cells if cell.cell["method"] == method]
    if not ours:
        known = ", ".join(sorted({cell.cell["method"] for cell in cells})) or "none"
        raise ValueError(f"--against {method}: no completed cell has this method (there are: {known})")
    shown = Table(title=f"{method} minus another method, paired, in points", title_justify="left")
    for header in ("method", "against", "task", "n", "difference [95%]", "p"):
        shown.add_column(header, no_wrap=True)
    for mine in ours:
        for other in cells:
            equal = "full" in (mine.cell["budget"], other.cell["budget"]) or (
                other.cell["budget"] == mine.cell["budget"]
            )
            if equal and other.setting == mine.setting and other.cell["method"] != method:
                for task, (n, result) in differences(mine, other).items():
                    low, high = result.ci
                    gap = f"{result.difference:+.1f} [{low:+.1f}, {high:+.1f}]"
                    shown.add_row(mine.label, other.label, task, str(n), gap, f"{result.p_value:.2g}")
    if not shown.row_count:
        raise ValueError(f"--against {method}: no other cell ran with the same model, benchmark and budget")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = command.parser("compare", __doc__)
    parser.add_argument("directory", type=Path, help="outputs/<tag>, or any directory above finished cells")
    parser.add_argument("--against", required=True, metavar="METHOD", help="the method others are taken from")
    asked = parser.parse_args(arguments)

    def show() -> None:
        Console(width=140).print(table(list(finished(asked.directory)), asked.against))

    return command.answered(show)


if __name__ == "__main__":
    sys.exit(main())
