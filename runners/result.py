"""The parts of result.json that more than one runner writes: who the cell is, what was asked, what came out.

From a planned cell and its finished lines alone: no model, no files. How lines came to be is the runner's
business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hcache import records
from hcache.records import Line, Result
from runners.config import budget_of
from runners.plan import PlannedCell
from runners.summary import summarise

KILLED = "Killed"
"""Type of the error of a cell whose process is gone without an outcome."""


def is_done(result: Result, limit: int | None) -> bool:
    """Whether a stored result answers a run with this limit. A lower limit is answered by what there is."""
    if result["status"] != "completed":
        return False
    stored = result["config"]["benchmark"].get("limit")  # runner=latency has none
    return stored is None or (limit is not None and limit <= stored)


def head(plan: PlannedCell, status: str) -> Result:
    """How every record begins."""
    return {
        "schema": records.SCHEMA,
        "status": status,
        "cell": plan.cell.record(),
        "config": plan.config,
        "config_hash": plan.cell.config_hash,
    }


def requested(plan: PlannedCell) -> dict[str, Any]:
    """The budget as asked for; a method that ignores it is asked for everything."""
    if not plan.run.method.uses_budget:
        return {"requested_fraction": 1.0, "requested_tokens": None}
    budget = budget_of(plan.run)
    return {"requested_fraction": budget.kept_fraction, "requested_tokens": budget.kept_tokens}


def completed(
    plan: PlannedCell, lines: Sequence[Line], notes: Sequence[str], provenance: Mapping[str, Any]
) -> Result:
    """The record of a cell whose lines are all there, in their canonical order."""
    benchmark = plan.run.benchmark
    summary = summarise(lines, requested(plan), benchmark.aggregates(lines))
    scores = {name: task["score"] for name, task in summary["tasks"].items()}
    return {
        **head(plan, "completed"),
        "score": benchmark.aggregate(scores),
        **summary,
        "notes": list(notes),
        "provenance": dict(provenance),
    }
