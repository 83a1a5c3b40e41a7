"""Compose the configuration, check it, hand it to a runner; nothing else. `python run.py --help` says how.

Exit code: 0, 1 if a cell failed, 2 for a command that can't be run, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

import runners
from hcache import records
from runners import launchers, overrides
from runners.config import CONF, ConfigError, register, typed
from runners.outcomes import OUTCOMES
from runners.plan import PlannedCell, compose_all
from runners.usage import usage

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def launch(config: DictConfig) -> None:
    """One job of Hydra's: one cell."""
    run = typed(config)
    outcome = runners.get(run.runner.name)(run)
    OUTCOMES.append(outcome)
    if outcome.message:
        log.info("%s: %s", outcome.directory or run.runner.name, outcome.message)


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit code."""
    asked = get_args_parser().parse_args(list(arguments))
    if asked.help:
        print(usage())
        return 0
    shows_only = asked.hydra_help or asked.cfg or asked.info or asked.shell_completion
    try:
        if asked.config_dir or asked.config_path or asked.config_name or asked.experimental_rerun:
            raise ConfigError(
                "the configuration is conf/; add a directory with hydra.searchpath=[file:///your/conf]"
            )
        if not shows_only and overrides.compares(overrides.parse(asked.overrides)):
            return compare(asked.overrides)
        plans = plan(asked.overrides, asked.multirun, check=not shows_only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    OUTCOMES.clear()
    launchers.register()
    sys.argv[1:] = arguments
    try:
        launch()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except SystemExit as end:  # so Hydra ends when a job raised; what the others left is still shown
        return conclude(plans) or int(bool(end.code))
    return conclude(plans)


def plan(lines: Sequence[str], multirun: bool, check: bool) -> list[PlannedCell]:
    """The cells of a command line, each checked; unchecked and empty where Hydra only shows something.

    Raises:
        ValueError: the command can't be run; the message is one line for the user.
    """
    check_lines(lines, multirun)
    if not check:
        return []
    from runners.checks import check_all  # imports torch: a typo is answered before that

    return check_all(lines, multirun)


def check_lines(lines: Sequence[str], multirun: bool) -> None:
    """Check what is typed and register what it names. Raises ValueError as `plan`."""
    typed_in = overrides.parse(lines)
    if not multirun:
        overrides.check_single(typed_in)
    overrides.check(typed_in)
    launchers.check(typed_in, multirun)
    register(overrides.plugins(typed_in))
    overrides.check(typed_in)  # once more: plug-ins and benchmarks are known now


def compare(lines: Sequence[str]) -> int:
    """Hand all cells of a command to a runner that shows them in one table; returns the exit code.

    Raises:
        ValueError: as `plan`.
    """
    check_lines(lines, multirun=True)
    from runners.budget import compare as show  # imports torch
    from runners.checks import check_run

    runs = compose_all(lines, multirun=True)
    for run in runs:
        check_run(run)
    show(runs)
    return 0


def conclude(plans: Sequence[PlannedCell]) -> int:
    """Print the table of all cells that left a record and the list of failed ones; returns the exit code."""
    left = _left([plan.directory for plan in plans])
    results = [result for result in left.values() if result is not None]
    if results:
        from runners.table import show

        show(results)
    if any(outcome.status == "interrupted" for outcome in OUTCOMES):
        print("stopped by SIGTERM; the same command goes on from here", file=sys.stderr)
        return 143
    busy = {o.directory: o.message for o in OUTCOMES if o.status == "busy"}
    for message in busy.values():
        print(f"refused: {message}", file=sys.stderr)
    failed = [
        str(place)
        for place, result in left.items()
        if place not in busy and (result is None or result["status"] == "failed")
    ]
    failed += [o.message for o in OUTCOMES if o.status == "failed" and o.directory not in left]
    for cell in failed:
        print(f"failed: {cell}", file=sys.stderr)
    return 1 if failed or busy else 0


def _left(planned: Sequence[Path]) -> dict[Path, records.Result | None]:
    """What is at each cell's place. Jobs on machines of another kind know better than the plan where."""
    told = [outcome.directory for outcome in OUTCOMES if outcome.directory is not None]
    left = {place: records.read_result(place) for place in [*planned, *told]}
    moved = set(told) - set(planned)
    return {place: result for place, result in left.items() if not moved or result or place in told}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
