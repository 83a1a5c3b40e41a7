"""Cells of one configuration that differ in seeds alone, joined: one score of several runs.

With one cell it is the record's. Of several, an example run under several seeds of the runtime counts once,
with its mean: repeating an example is no new evidence. Another seed of the benchmark makes other examples.
The interval is Wilson's of the mean over those examples, as in the records. All tasks together take theirs
from the tasks'. Knows cells, no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from statistics import fmean

from analysis.cells import Cell
from hcache.metrics import mean_interval, wilson

NAN = float("nan")
TOGETHER = "all tasks"
"""How all of them together are called."""
OFFICIAL = "official"
"""A record's average that weighs tasks as the benchmark's authors do."""


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
    """The benchmark's score of all tasks together: the mean over the seeds.

    Where it is the plain mean of the tasks, its interval comes from theirs (hcache.metrics.mean_interval). An
    average of the benchmark's own (OFFICIAL, or another that is that very score) has that of its record, and
    none of several runs.
    """
    own = [cell for cell in cells if cell.completed and cell.result["score"] is not None]
    if not own:
        return Score()
    mean = fmean(cell.result["score"] for cell in own)
    found = [score(own, task) for task in dict.fromkeys(t for cell in own for t in cell.result["tasks"])]
    averages = own[0].result.get("aggregates") or {}
    if OFFICIAL in averages:
        low, high = averages[OFFICIAL]["ci95"] if len(own) == 1 else (NAN, NAN)
    else:
        low, high = _from_tasks(mean, found) or _recorded(own) or (NAN, NAN)
    return Score(mean, low, high, sum(task.n for task in found))


def _recorded(cells: Sequence[Cell]) -> tuple[float, float] | None:
    """Of one run, one of whose averages is its score."""
    if len(cells) > 1:
        return None
    result = cells[0].result
    averages = (result.get("aggregates") or {}).values()
    found = next((own["ci95"] for own in averages if own["score"] == result["score"]), None)
    return (found[0], found[1]) if found else None


def _from_tasks(mean: float, tasks: Sequence[Score]) -> tuple[float, float] | None:
    if not tasks or not isclose(mean, fmean(task.mean for task in tasks), abs_tol=1e-9):
        return None
    return mean_interval([task.mean for task in tasks], [(task.low, task.high) for task in tasks])


def _joined(cells: Sequence[Cell], task: str) -> Score:
    runs: dict[tuple[object, str], list[float]] = {}
    for cell in cells:
        seed = cell.result["config"]["benchmark"].get("seed")
        for line in cell.lines() if cell.has_lines else ():
            if line["task"] == task and line["score"] is not None:
                runs.setdefault((seed, str(line["id"])), []).append(line["score"])
    if not runs:  # a metric of whole tasks, or none
        whole = [cell.result["tasks"][task]["score"] for cell in cells]
        return Score() if None in whole else Score(fmean(whole))
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
