"""What the settings of a cell mean together, checked before any model loads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from hcache import records
from hcache.budget import InfeasibleBudget
from hcache.methods import EvictionMethod
from hcache.models import ModelSpec, check_path
from hcache.registry import unknown_name
from runners import RECORDING, RUNNERS
from runners.config import ConfigError, RunConfig, budget_of, geometry_of
from runners.latency_settings import check_latency
from runners.plan import PlannedCell, compose_all, planned
from runners.prompts import check_lengths

_TAG_CHARACTERS = 64
TRACKERS = ("wandb", "none")


def check_all(overrides: Sequence[str], multirun: bool) -> list[PlannedCell]:
    """Every cell of a command line that will leave a record, checked. Raises ValueError as check_run."""
    plans = [check_run(run) for run in compose_all(overrides, multirun)]
    return [plan for plan in plans if plan is not None]


def check_run(run: RunConfig) -> PlannedCell | None:
    """The cell that `run` plans; None for runners that leave no record of a cell.

    Raises:
        ValueError: settings that don't go together, a model that isn't there, a foreign profile, a record
            at the cell's place that can't be read back.
    """
    _check_names(run)
    _check_tokenizer(run)
    if run.runner.name == "score":
        return None
    if run.runner.name == "merge":
        check_path(run.model)
        plan = planned(run)
        records.read_result(plan.directory)
        return plan
    if run.runner.name not in RECORDING:
        check_path(run.model)
        return None
    _check_window(run)
    check_path(run.model)
    if run.runner.name == "latency":
        check_latency(run)
        _check_own_profile(run)
    else:
        with suppress(InfeasibleBudget):  # a result, not a mistake: the cell will say so in its record
            known_infeasible(run)
        if run.benchmark.by_library:
            run.benchmark.check()
    plan = planned(run)
    records.read_result(plan.directory)
    return plan


def _check_names(run: RunConfig) -> None:
    for kind, name, known in (("runner", run.runner.name, RUNNERS), ("tracker", run.tracker.name, TRACKERS)):
        if name not in known:
            raise ConfigError(unknown_name(kind, name, known))
    if run.tag != records.safe_name(run.tag) or len(run.tag) > _TAG_CHARACTERS:
        raise ConfigError(
            f"tag={run.tag!r} names a directory and a W&B group: "
            f"use up to {_TAG_CHARACTERS} letters, digits and ._=+-"
        )


def _check_tokenizer(run: RunConfig) -> None:
    """Random weights understand no text: they can be timed and planned for, nothing else."""
    if run.model.random and run.runner.name in ("evaluate", "profile"):
        raise ConfigError(
            f"model={run.model.name} has random weights and no tokenizer, so runner={run.runner.name} can't "
            f"use it; time it with runner=latency model={run.model.name}, or choose a model with weights"
        )


def _check_window(run: RunConfig) -> None:
    """A window that a method always keeps must leave room in a budget of tokens."""
    tokens = budget_of(run).kept_tokens
    window = getattr(run.method, "window", None) if isinstance(run.method, EvictionMethod) else None
    if tokens is not None and window is not None and window >= tokens:
        raise ConfigError(
            f"method.window={window} must be smaller than the budget of {tokens} tokens; "
            "lower window or raise the budget"
        )


def known_infeasible(run: RunConfig) -> None:
    """Compare budget and method for the prompt lengths that the benchmark knows ahead, from the model's
    config.

    Raises:
        InfeasibleBudget: no example of the benchmark could run.
        ValueError: the method refuses the model (a foreign profile, or none).
    """
    _check_tokenizer(run)
    shape = geometry_of(run.model)
    if run.method.profiled is not None and shape.fingerprint is None:
        return  # Which profile fits can't be told before the weights are here.
    _check_own_profile(run)
    lengths = run.benchmark.prompt_lengths()
    if run.method.uses_budget and lengths:
        check_lengths(run.method, shape, budget_of(run), lengths)


def _check_own_profile(run: RunConfig) -> None:
    """Raise ConfigError, with the command that makes one, where there is no profile; ForeignProfile.

    Only where the weights are here, and with them what a profile is tied to.
    """
    from hcache.profiling import ProfileNotFound

    if run.method.profiled is None:
        return
    shape = geometry_of(run.model)
    if shape.fingerprint is None:
        return
    try:
        run.method.profiled.head_profile(shape)
    except ProfileNotFound as error:
        raise ConfigError(str(error).replace("model=...", asked_model(run.model))) from error


def asked_model(spec: ModelSpec) -> str:
    """What to type on the command line for this model."""
    known = spec.path == spec.name or spec.random
    return f"model={spec.name}" if known else f"model=hf model.path={spec.path}"
