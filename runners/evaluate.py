"""runner=evaluate: one cell from its configuration to its records.

Read back what is done, load the model, run the rest batch by batch, each batch forced to disk before the
next begins, and sum up. A cell never raises into the launcher: it ends as completed, infeasible, failed
(with its traceback) or interrupted. Knows the library's interfaces and the records; no method, benchmark or
tracker by name.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import Any

from hcache import records
from hcache.budget import InfeasibleBudget
from hcache.records import Line, Predictions, Result
from runners import CellOutcome
from runners.checks import known_infeasible
from runners.config import RunConfig
from runners.harness import evaluate_plan
from runners.interrupt import Interrupted, StopSignal
from runners.lock import CellBusy, locked
from runners.notes import counted
from runners.plan import PlannedCell, planned
from runners.progress import CellProgress
from runners.prompts import EmptyShard, Prompt
from runners.result import completed, head, is_done, requested
from runners.tracking import Tracker, make_tracker
from runners.work import Worker

log = logging.getLogger(__name__)


def run(config: RunConfig) -> CellOutcome:
    """Evaluate one cell, or read back what an earlier run of it left."""
    plan = planned(config)
    try:
        if (done := _read_back(plan)) is not None:
            return done
        with StopSignal() as stop, locked(plan.directory):
            return _read_back(plan) or _outcome(plan, stop)  # another process may have ended it meanwhile
    except CellBusy as busy:
        return CellOutcome("busy", plan.directory, str(busy))


def _read_back(plan: PlannedCell) -> CellOutcome | None:
    stored = records.read_result(plan.directory)
    if stored is None or not is_done(stored, plan.run.benchmark.limit):
        return None
    log.info("%s is done, read back", plan.directory)
    return CellOutcome(stored["status"], plan.directory)


def _outcome(plan: PlannedCell, stop: StopSignal) -> CellOutcome:
    try:
        _evaluate(plan, stop)
    except Interrupted:
        return CellOutcome("interrupted", plan.directory, _stopped(plan))
    except EmptyShard as nothing:
        return _without_examples(plan, str(nothing))
    except InfeasibleBudget as error:
        return _without_numbers(plan, "infeasible", error)
    except (Exception, SystemExit) as error:
        return _without_numbers(plan, "failed", error)
    return CellOutcome("completed", plan.directory)


def _stopped(plan: PlannedCell) -> str:
    if plan.run.benchmark.by_library:
        return "stopped; the same command starts this cell again, nothing of it is kept"
    return "stopped; the same command goes on from here"


def _evaluate(plan: PlannedCell, stop: StopSignal) -> None:
    stop.check()
    if plan.run.benchmark.by_library:
        if plan.run.runner.trace:
            log.warning("runner.trace has no effect: this benchmark's library runs its examples")
        evaluate_plan(plan, stop)
        return
    known_infeasible(plan.run)
    worker = Worker(plan.run, plan.directory)
    predictions = Predictions(plan.directory)
    finished, pending = _resume(worker.prompts, predictions)
    tracker = make_tracker(plan.run.tracker, plan.cell, plan.directory)
    tracker.start(plan.config, finished)
    lines, result = list(finished), None
    try:
        with CellProgress(plan.directory.name, len(worker.prompts), finished) as progress:
            for batch in pending:
                stop.check()
                lines += _run_batch(worker, batch, predictions, tracker, progress)
        result = _completed(plan, worker, lines)
        records.write_result(plan.directory, result)
    finally:
        tracker.finish(result, lines)


def _resume(prompts: Sequence[Prompt], predictions: Predictions) -> tuple[list[Line], list[list[Prompt]]]:
    """What stands and what is to run. Lines of batches that run again are removed before they do."""
    recorded = predictions.load()
    finished, pending = split(prompts, recorded)
    again = {prompt.key for batch in pending for prompt in batch}
    kept = [line for line in recorded if _key(line) not in again]
    if len(kept) < len(recorded):
        predictions.rewrite(kept)
    return finished, pending


def _run_batch(
    worker: Worker,
    batch: Sequence[Prompt],
    predictions: Predictions,
    tracker: Tracker,
    progress: CellProgress,
) -> list[Line]:
    lines = worker.run(batch)
    predictions.append(lines)
    for line in lines:
        tracker.example(line)
        progress.update(line)
    return lines


def split(prompts: Sequence[Prompt], recorded: Sequence[Line]) -> tuple[list[Line], list[list[Prompt]]]:
    """Lines that stand, in canonical order, and batches to run: one with any member missing runs whole."""
    known = {_key(line): line for line in recorded}
    by_batch: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_batch.setdefault(prompt.batch, []).append(prompt)
    whole = {number: all(p.key in known for p in members) for number, members in by_batch.items()}
    finished = [known[prompt.key] for prompt in prompts if whole[prompt.batch]]
    return finished, [members for number, members in by_batch.items() if not whole[number]]


def _key(line: Line) -> tuple[str, str]:
    return line["task"], line["id"]


def _completed(plan: PlannedCell, worker: Worker, lines: Sequence[Line]) -> Result:
    by_key = {_key(line): line for line in lines}
    ordered = [by_key[prompt.key] for prompt in worker.prompts]
    made = records.provenance(
        device=worker.device_name,
        started=min(line["started"] for line in ordered),
        seconds=sum(line["seconds"] for line in ordered),
        seed=plan.run.runtime.seed,
    )
    return completed(plan, ordered, [*worker.notes(), *counted(ordered)], made)


def _without_examples(plan: PlannedCell, message: str) -> CellOutcome:
    """Record a shard that nothing is left for; it is completed, so runner=merge has all parts."""
    result = {
        **head(plan, "completed"),
        "score": None,
        "tasks": {},
        "budget": requested(plan),
        "notes": [message],
        "provenance": records.provenance(None, records.now(), 0.0, plan.run.runtime.seed),
    }
    Predictions(plan.directory).append([])
    records.write_result(plan.directory, result)
    return CellOutcome("completed", plan.directory, message)


def _without_numbers(plan: PlannedCell, status: str, error: BaseException) -> CellOutcome:
    """Record a cell that has no numbers, and why."""
    message = str(error) or type(error).__name__
    reason: dict[str, Any] = {"type": type(error).__name__, "message": message}
    if isinstance(error, InfeasibleBudget):
        reason["smallest_fraction"] = error.smallest_fraction
        reason["smallest_tokens"] = error.smallest_tokens
    else:
        reason["traceback"] = "".join(traceback.format_exception(error))
    result = {
        **head(plan, status),
        "error": reason,
        "budget": requested(plan),
        "provenance": records.provenance(None, records.now(), 0.0, plan.run.runtime.seed),
    }
    records.write_result(plan.directory, result)
    log.warning("%s is %s: %s", plan.directory, status, message)
    return CellOutcome(status, plan.directory, message)
