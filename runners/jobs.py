"""The jobs of a sweep that run in other processes: which are to run, what one does there, and how it ended.

A job is a command line. The process that gets it composes the cell again, as run.py would, so no
configuration and no class travels; it needs this code and the outputs at the same paths. Knows no launcher.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runners
from hcache import records
from runners import RECORDING, CellOutcome, interrupt, overrides
from runners.config import register
from runners.lock import CellBusy, left_by, locked
from runners.outcomes import OUTCOMES
from runners.plan import PlannedCell, compose_all, planned
from runners.progress import ConsoleHandler
from runners.result import KILLED, head, is_done, requested

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One command line.

    Args:
        lines: its overrides.
        place: the working directory it was typed in.
    """

    lines: tuple[str, ...]
    place: str

    def __call__(self) -> CellOutcome:
        """Do it, in the process that got it."""
        os.chdir(self.place)
        interrupt.forget()  # what was asked of an earlier job of this process
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ConsoleHandler()], force=True)
        register(overrides.plugins(overrides.parse(self.lines)))
        (run,) = compose_all(self.lines, multirun=False)
        return runners.get(run.runner.name)(run)

    def checkpoint(self) -> Any:
        """What submitit queues again when SLURM takes the machine away: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    @property
    def name(self) -> str:
        """What to call it where it has no directory."""
        return " ".join(self.lines)


def pending(sweep: Sequence[Sequence[str]]) -> list[Job]:
    """What is missing of a sweep: each cell once, those that are done read back."""
    found: dict[Path, Job] = {}
    others = []
    for lines in sweep:
        job = Job(tuple(lines), os.getcwd())
        plan = plan_of(job)
        if plan is None:
            others.append(job)
        elif (done := _read_back(plan)) is not None:
            OUTCOMES.append(done)
        else:
            found.setdefault(plan.directory, job)
    return [*found.values(), *others]


def plan_of(job: Job) -> PlannedCell | None:
    """The cell of a job; None for runners that leave no record of one."""
    (run,) = compose_all(job.lines, multirun=False)
    return planned(run) if run.runner.name in RECORDING else None


def _read_back(plan: PlannedCell) -> CellOutcome | None:
    stored = records.read_result(plan.directory)
    done = stored is not None and is_done(stored, plan.run.benchmark.limit)
    return CellOutcome("completed", plan.directory) if done else None


def ended(job: Job, outcome: CellOutcome) -> None:
    """A job came back."""
    log.info("%s: %s %s", outcome.status, outcome.directory or job.name, outcome.message)
    OUTCOMES.append(outcome)


def left(job: Job) -> None:
    """Nobody waits for this job any more."""
    plan = plan_of(job)
    OUTCOMES.append(CellOutcome("interrupted", plan.directory if plan else None, job.name))


def raised(job: Job, error: BaseException) -> None:
    """A job ended with an exception; runners keep theirs to themselves where they can."""
    OUTCOMES.append(_lost(job, type(error).__name__, error))


def died(job: Job, error: BaseException) -> None:
    """A job's process is gone without an outcome; `error` is how that was noticed."""
    OUTCOMES.append(_lost(job, KILLED, error))


def _lost(job: Job, kind: str, error: BaseException) -> CellOutcome:
    log.error("%s: %s", job.name, error)
    plan = plan_of(job)
    if plan is None:
        return CellOutcome("failed", message=f"{job.name}: {_line(error)}")
    who = left_by(plan.directory) or "its process"
    try:
        with locked(plan.directory):
            return _recorded(plan, kind, who, error)
    except CellBusy as busy:  # the connection to it is gone, not the process
        return CellOutcome("busy", plan.directory, str(busy))


def _recorded(plan: PlannedCell, kind: str, who: str, error: BaseException) -> CellOutcome:
    """Put on record what is known of a cell whose job is gone, if it hadn't ended before."""
    if (done := _read_back(plan)) is not None:
        return done
    lines = sum(path.read_bytes().count(b"\n") for path in plan.directory.glob("*.jsonl"))
    message = (
        f"{who} was gone after {lines} lines of results, which are kept ({_line(error)}); repeat the command"
    )
    result = {
        **head(plan, "failed"),
        "error": {"type": kind, "message": message, "traceback": str(error)},
        "budget": requested(plan),
        "provenance": records.provenance(None, records.now(), 0.0, plan.run.runtime.seed),
    }
    records.write_result(plan.directory, result)
    return CellOutcome("failed", plan.directory, message)


def _line(error: BaseException) -> str:
    """What an exception says, in one line that fits a table's notes."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"
