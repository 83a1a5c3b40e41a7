"""Traces of one example side by side: what cells that ran with `runner.trace` left of it (hcache.trace).

The example is the first that all of those cells have, or the one that is asked for. Reads files only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analysis.cells import Cell, by_label, commits, devices, listed, side_by_side
from hcache.trace import DIRECTORY, Trace, read


@dataclass(frozen=True)
class Traced:
    """A cell's trace of the example."""

    label: str
    cell: Cell
    trace: Trace

    @property
    def title(self) -> str:
        """The method and its budget."""
        return self.label if self.cell.budget == "full" else f"{self.label}, {self.cell.kept} kept"

    @property
    def names(self) -> dict[str, object]:
        """Columns that every row of data begins with."""
        who = {"label": self.label, "method": self.cell.method, "kept": self.cell.kept}
        return {**who, "task": self.trace.task, "id": self.trace.id}


def traced(
    cells: Sequence[Cell], example: str | None, has: Callable[[Trace], object], what: str
) -> list[Traced]:
    """The cells whose trace has what is to be shown.

    Args:
        example: TASK/ID, or None for the first that all of them have.
        has: whether a trace is of use; what: what it must have, in words.

    Raises:
        ValueError: no such trace, no example that all have, or cells of different settings.
    """
    groups = by_label(side_by_side(cells))
    found = [(label, cell, _by_example(cell, has)) for label, group in groups.items() for cell in group]
    found = [(label, cell, own) for label, cell, own in found if own]
    if not found:
        raise ValueError(f"no cell has traces with {what}; run one anew with runner.trace=1, or another tag")
    common = [name for name in found[0][2] if all(name in own for *_, own in found)]
    if not common or (example is not None and example not in common):
        known = ", ".join(common) or "none"
        raise ValueError(f"--example {example}: not every cell has a trace of it (all have: {known})")
    chosen = example or common[0]
    return [Traced(label, cell, own[chosen]) for label, cell, own in found]


def _by_example(cell: Cell, has: Callable[[Trace], object]) -> dict[str, Trace]:
    """Traces by TASK/ID; files that can't be read are named on stderr."""
    found = {}
    for path in sorted((cell.directory / DIRECTORY).glob("*.npz")):
        try:
            trace = read(path)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if has(trace):
            found[f"{trace.task}/{trace.id}"] = trace
    return found


def caption(shown: Sequence[Traced]) -> str:
    """Which example, and where it ran."""
    cells, trace = [one.cell for one in shown], shown[0].trace
    who = cells[0].result["cell"]
    return (
        f"{who['model']} on {who['benchmark']}, example {trace.id} of "
        f"{trace.task}, {trace.prompt_tokens} prompt tokens; {listed(devices(cells))}; commit "
        f"{listed(commits(cells))}."
    )
