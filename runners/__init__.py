"""What can be done with a configuration: one module a runner, each with `run(RunConfig) -> CellOutcome`.

Knows the runners' names; a runner's module is imported when it is asked for, since most import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hcache.registry import unknown_name

if TYPE_CHECKING:
    from runners.config import RunConfig

RUNNERS = {
    "budget": "runners.budget",
    "evaluate": "runners.evaluate",
    "fetch": "runners.fetch",
    "latency": "runners.latency",
    "merge": "runners.merge",
    "profile": "runners.profile",
    "score": "runners.score",
}
RECORDING = ("evaluate", "latency")
"""Runners that leave the record of a cell, which can be half done and go on."""
COMPARING = ("budget",)
"""Runners that take all cells of a command at once and show them in one table: they sweep without -m."""


@dataclass(frozen=True)
class CellOutcome:
    """How one run ended.

    Args:
        status: completed, infeasible, failed, interrupted (asked to stop; the same command resumes), or busy
            (another process is at work on the cell).
        directory: where its records are, None if it has none.
        message: what to tell the user, in one line; empty where the records say it.
    """

    status: str
    directory: Path | None = None
    message: str = ""


def get(name: str) -> Callable[[RunConfig], CellOutcome]:
    """The runner called `name`. Raises ValueError with a suggestion."""
    if name not in RUNNERS:
        raise ValueError(unknown_name("runner", name, RUNNERS))
    runner: Callable[[RunConfig], CellOutcome] = import_module(RUNNERS[name]).run
    return runner
