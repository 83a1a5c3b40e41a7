"""Cells of one configuration that differ in seeds alone, joined: one score of several runs.

With one cell it is the record's. Of several, an example run under several seeds of the runtime counts once,
with its mean: repeating an example is no new evidence. Another seed of the benchmark makes other examples.
The interval is Wilson's of the mean over those examples, as in the records. Knows cells, no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from analysis.cells import Cell
from hcache.metrics import wilson

NAN = float("nan")


@dataclass(frozen=True)
class Score:
    """A mean, 0 to 100, its 95% interval and the examples behind it; NaN where there is none."""

    mean: float = NAN
    low: float = NAN
    high: float = NAN
    n: int = 0


def by_budget(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each requested budget, in their order."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.budget, []).append(cell)
    return list(groups.values())


def score(cells: Sequence[Cell], task: str) -> Score:
    """Of a task, over the completed ones of these cells."""
    own = [cell for cell in cells if cell.completed and task in cell.result.get("tasks", {})]
    if len(own) > 1:
        return _joined(own, task)
    if not own or own[0].result["tasks"][task]["score"] is None:
        return Score()
    entry = own[0].result["tasks"][task]
    low, high = entry["ci95"] or (NAN, NAN)
    return Score(entry["score"], low, high, entry["n"])


def total(cells: Sequence[Cell]) -> Score:
    """The benchmark's score of all tasks together: the mean over the seeds, without an interval."""
    own = [cell.result["score"] for cell in cells if cell.completed and cell.result["score"] is not None]
    n = max(
        (sum(task["n"] for task in cell.result["tasks"].values()) for cell in cells if cell.completed),
        default=0,
    )
    return Score(fmean(own), n=n) if own else Score()


def _joined(cells: Sequence[Cell], task: str) -> Score:
    runs: dict[tuple[object, str], list[float]] = {}
    for cell in cells:
        seed = cell.result["config"]["benchmark"].get("seed")
        for line in cell.lines():
            if line["task"] == task and line["score"] is not None:
                runs.setdefault((seed, str(line["id"])), []).append(line["score"])
    if not runs:  # a metric of whole tasks
        return Score(fmean(cell.result["tasks"][task]["score"] for cell in cells))
    mean = fmean(fmean(scores) for scores in runs.values())
    low, high = wilson(mean, len(runs))
    return Score(100 * mean, 100 * low, 100 * high, len(runs))


def seeds(cells: Sequence[Cell]) -> str:
    """`2 seeds a point`, where there are several; empty otherwise."""
    most = max((len({_seed(cell) for cell in group}) for group in by_budget(cells)), default=0)
    return f"{most} seeds a point" if most > 1 else ""


def _seed(cell: Cell) -> tuple[object, object]:
    config = cell.result["config"]
    return config["runtime"].get("seed"), config["benchmark"].get("seed")
