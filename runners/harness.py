"""benchmark=lm_eval: one cell whose tasks lm-evaluation-harness runs, from its configuration to its records.

The part of runner=evaluate that another library does: it asks (hcache.harness), and the record is written
when it has its scores. Nothing is resumed inside a run of the library.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, partial
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hcache import records
from hcache.budget import Budget
from hcache.engine import EngineSettings
from hcache.geometry import Geometry
from hcache.harness import results as reported
from hcache.methods import Method
from hcache.metrics import wilson
from hcache.models import LoadedModel
from hcache.records import Line, Predictions, Result
from runners import loading, work
from runners.checks import known_infeasible
from runners.config import ConfigError, RunConfig, budget_of
from runners.interrupt import StopSignal
from runners.plan import PlannedCell
from runners.prompts import ADJUSTED_SHARE, check_lengths
from runners.result import head, requested
from runners.summary import summarise
from runners.tracking import make_tracker

if TYPE_CHECKING:
    from hcache.harness.model import Answered, HarnessLM

log = logging.getLogger(__name__)
_PLAIN_SHARE, _PLAIN_SECONDS = 0.1, 30.0
_DRAWS = 1000
"""Of the library's bootstrap, for metrics without a standard error in closed form."""


def evaluate_plan(plan: PlannedCell, stop: StopSignal) -> None:
    """Let the library run the cell's tasks, and write what came out.

    Raises:
        InfeasibleBudget: the method can't run within the budget on any context.
        Interrupted: the process was asked to stop; nothing is written.
        ValueError: settings that don't go together, unknown tasks, contexts too short for the budget.
    """
    stop.check()
    plan.run.benchmark.check()
    _check_runtime(plan.run)
    known_infeasible(plan.run)
    tracker = make_tracker(plan.run.tracker, plan.cell, plan.directory)
    lines: list[Line] = []
    result = None
    tracker.start(plan.config, [])
    try:
        result, lines = _evaluated(plan, stop)
        Predictions(plan.directory).rewrite(lines)
        records.write_result(plan.directory, result)
        for line in lines:
            if line["score"] is not None:
                tracker.example(line)
    finally:
        tracker.finish(result, lines)


def _check_runtime(run: RunConfig) -> None:
    """Tasks say how texts are drawn. Raises ConfigError."""
    if run.runtime.temperature:
        raise ConfigError(
            f"runtime.temperature={run.runtime.temperature} has no effect with benchmark=lm_eval: its tasks "
            "say how texts are drawn; set benchmark.gen_kwargs='do_sample=true,temperature=...' instead"
        )


def _evaluated(plan: PlannedCell, stop: StopSignal) -> tuple[Result, list[Line]]:
    run = plan.run
    started, clock = records.now(), time.perf_counter()
    with _quiet():
        manager, names = _tasks(run)
        if run.runtime.threads is not None:
            torch.set_num_threads(run.runtime.threads)
        loaded = loading.loaded(run)
        _check_template(run, loaded)
        model = _model(run, loaded, _Progress(plan.directory.name, stop))
        results = _simple_evaluate(run, model, manager, names)
    if not model.answered:
        raise ValueError(f"benchmark.tasks={list(run.benchmark.tasks)} asked for nothing")
    entries, lines = _documents(results, model.answered)
    seconds = time.perf_counter() - clock
    return _completed(plan, loaded, model, _Tasks(results, entries), (started, seconds)), lines


def _model(run: RunConfig, loaded: LoadedModel, tell: _Progress) -> HarnessLM:
    from hcache.harness.model import HarnessLM, Running  # imports the library

    budget, settings = budget_of(run), run.runtime
    longest = run.benchmark.max_length
    running = Running(
        method=run.method,
        budget=budget,
        budgets=partial(_budgets, run.method, loaded.geometry, budget),
        backend=run.model.attention,
        engine=EngineSettings.of(settings.graphs, settings.compile),
        batch_size=settings.batch_size,
        seed=settings.seed,
        window=loaded.context_tokens if longest is None else min(longest, loaded.context_tokens),
    )
    return HarnessLM(loaded, running, tell)


def _simple_evaluate(run: RunConfig, model: Any, manager: Any, names: Sequence[str]) -> reported.Results:
    """The library's own evaluation. Its seeds are its defaults, so that prompts are those of other runs."""
    settings = run.benchmark
    results = importlib.import_module("lm_eval.evaluator").simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        log_samples=True,
        bootstrap_iters=_DRAWS,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.apply_chat_template and settings.fewshot_as_multiturn,
        system_instruction=settings.system_instruction,
        gen_kwargs=settings.gen_kwargs,
        fewshot_random_seed=settings.fewshot_seed,
        torch_random_seed=run.runtime.seed,
        confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
    )
    assert results is not None, "one process has rank 0"
    found: reported.Results = results
    return found


def _check_template(run: RunConfig, loaded: LoadedModel) -> None:
    """Raise ConfigError where a chat template is asked for and there is none."""
    settings = run.benchmark
    if settings.apply_chat_template and not getattr(loaded.tokenizer, "chat_template", None):
        raise ConfigError(
            f"benchmark.apply_chat_template=true, but the tokenizer of {loaded.name} has no chat template; "
            "set it to false, or choose an instruct model"
        )


# --- tasks


def _tasks(run: RunConfig) -> tuple[Any, list[str]]:
    """The library's task manager, and the names that benchmark.tasks stands for. Raises ConfigError."""
    settings = run.benchmark
    manager = _manager(settings.include_path, settings.metadata, run.model.path, settings.tasks)
    found: list[str] = []
    for task in settings.tasks:
        matched = manager.match_tasks([task]) if any(sign in task for sign in "*?[") else [task]
        if not matched or not (matched[0] in manager.all_tasks or Path(task).is_file()):
            raise ConfigError(_unknown(task, manager.all_tasks))
        found += matched
    return manager, list(dict.fromkeys(found))


@lru_cache(maxsize=2)
def _manager(include: str | None, metadata: str | None, model: str, names: tuple[str, ...]) -> Any:
    """The library's index of tasks, that of one's own files alone where they have all that is asked for.

    Reading all of the library's files takes seconds. Tasks that count tokens find the tokenizer in the data.
    """
    make = importlib.import_module("lm_eval.tasks").TaskManager
    data = {"pretrained": model, **(json.loads(metadata) if metadata else {})}
    place = None if include is None else str(Path(include).expanduser())
    if place is not None:
        own = make(include_path=place, include_defaults=False, metadata=data)
        if all(name in own.all_subtasks for name in names):
            return own
    return make(include_path=place, metadata=data)


def _unknown(task: str, known: Sequence[str]) -> str:
    """The library has thousands of tasks: only the nearest are named."""
    close = get_close_matches(task, known, n=5, cutoff=0.6)
    hint = f"; did you mean {', '.join(repr(name) for name in close)}?" if close else ""
    return (
        f"benchmark.tasks: lm-evaluation-harness {_version()} knows no task '{task}'{hint} "
        "(`lm_eval ls tasks` lists them; for files of your own set benchmark.include_path)"
    )


def _version() -> str:
    return str(importlib.import_module("lm_eval").__version__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of the library only, and its bootstrap in this process, not in copies of it."""
    logger, key = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, before = logger.level, os.environ.get(key)
    logger.setLevel(logging.WARNING)
    os.environ[key] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


class _Progress:
    """A line in the log now and then, and the place where a run can be stopped."""

    def __init__(self, name: str, stop: StopSignal) -> None:
        self._name, self._stop = name, stop
        self._shown, self._at = 0, time.monotonic()

    def __call__(self, kind: str, done: int, total: int) -> None:
        """One more request of a kind is done. Raises Interrupted."""
        self._stop.check()
        enough = done - self._shown >= _PLAIN_SHARE * total or done < self._shown
        if enough or done == total or time.monotonic() - self._at > _PLAIN_SECONDS:
            self._shown, self._at = done, time.monotonic()
            log.info("%s: %d/%d requests of kind %s", self._name, done, total, kind)


def _budgets(
    method: Method, geometry: Geometry, budget: Budget, contexts: Sequence[tuple[str, int]]
) -> dict[int, Budget]:
    """The budget for each length of a context. An empty one is a start token, and nobody is asked to drop it.

    Raises:
        InfeasibleBudget: as check_lengths.
        ConfigError: too many contexts of a task are too short for the budget.
    """
    found = check_lengths(method, geometry, budget, {tokens for _, tokens in contexts if tokens > 1})
    total = Counter(task for task, _ in contexts)
    adjusted = Counter(task for task, tokens in contexts if tokens > 1 and found[tokens] != budget)
    for task, count in adjusted.items():
        if count > ADJUSTED_SHARE * total[task]:
            raise ConfigError(
                f"{count} of {total[task]} contexts of task {task} are too short for method {method.name} "
                f"and budget {budget.label}, more than {ADJUSTED_SHARE:.0%}; set budget.kept_tokens, which "
                "keeps short contexts whole, or lengthen them with benchmark.num_fewshot"
            )
    return {**found, 1: Budget(kept_fraction=1.0)}


# --- records


@dataclass(frozen=True)
class _Tasks:
    """What the library reports, and the record's entry of each task."""

    results: reported.Results
    entries: dict[str, dict[str, Any]]


def _documents(
    results: reported.Results, answered: Sequence[Answered]
) -> tuple[dict[str, dict[str, Any]], list[Line]]:
    """The entries of the tasks, and one line a document with what its requests took."""
    requests: dict[tuple[str, int], list[Answered]] = {}
    for one in answered:
        requests.setdefault((one.label.task, one.label.document), []).append(one)
    entries, lines = {}, []
    for task in results["samples"]:
        scores = reported.task_scores(results, task, wilson)
        entries[task] = scores.record
        for document, answer in reported.documents(results, task, scores):
            lines.append({**answer, **_taken(requests[task, document])})
    return entries, lines


def _taken(requests: Sequence[Answered]) -> dict[str, Any]:
    """What the requests of one document took: times and tokens together, bytes and counters on average."""
    parts = [_request(one) for one in requests]
    first = parts[0]
    names = dict.fromkeys(name for part in parts for name in part["counters"])
    adjusted = [
        part["adjusted_budget_tokens"] for part in parts if part["adjusted_budget_tokens"] is not None
    ]
    peaks = [p["memory"]["peak_device_bytes"] for p in parts if p["memory"]["peak_device_bytes"] is not None]
    memory = {
        name: _mean([part["memory"][name] for part in parts])
        for name in first["memory"]
        if "peak" not in name
    }
    summed = ("prompt_tokens", "new_tokens", "prefill_ms", "decode_ms", "decode_steps", "seconds")
    return {
        **{name: fsum(part[name] for part in parts) for name in ("prefill_ms", "decode_ms", "seconds")},
        **{name: sum(part[name] for part in parts) for name in summed if name.endswith(("tokens", "steps"))},
        "memory": {**memory, "peak_device_bytes": max(peaks) if peaks else None},
        "counters": {name: _mean([part["counters"].get(name, 0.0) for part in parts]) for name in names},
        "batch": first["batch"],
        "adjusted_budget_tokens": max(adjusted) if adjusted else None,
        "requests": len(parts),
        "requests_uncompressed": sum(one.whole for one in requests),
        "cut": any(one.cut for one in requests),
        "started": min(one.started for one in requests),
    }


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def _request(one: Answered) -> Line:
    """A request as summarise takes lines; the score is the library's business."""
    return {
        "task": one.label.task,
        "metric": "",
        "score": 0.0,
        **work.measured(one.generation, one.row),
        "batch": one.batch,
        "adjusted_budget_tokens": one.adjusted,
        "seconds": one.seconds,
    }


def _completed(
    plan: PlannedCell, loaded: LoadedModel, model: HarnessLM, tasks: _Tasks, taken: tuple[str, float]
) -> Result:
    percent = [name for name, entry in tasks.entries.items() if entry["scale"] == "percent"]
    groups = reported.group_scores(tasks.results, percent)
    score, notes = reported.overall(tasks.results, tasks.entries, groups)
    requests = [_request(one) for one in model.answered]
    summary = summarise(requests, requested(plan))
    counters = {**summary["counters"], **_counts(model.answered)}
    started, seconds = taken
    made = records.provenance(loading.device_name(loaded), started, seconds, plan.run.runtime.seed)
    made["versions"] = {**made["versions"], "lm_eval": _version()}
    return {
        **head(plan, "completed"),
        "score": score,
        **summary,
        "budget": {**summary["budget"], "attended_fraction": _attended(requests)},
        "tasks": tasks.entries,
        "aggregates": groups,
        "counters": counters,
        "notes": [*_notes(plan.run, loaded, model), *notes],
        "provenance": made,
    }


def _attended(requests: Sequence[Line]) -> float:
    """Share of all contexts' tokens that is attended to; an empty context counts as the token it is."""
    weights = [request["memory"]["full_kv_bytes"] for request in requests]
    shares = [request["counters"]["attended_fraction"] for request in requests]
    return fsum(w * s for w, s in zip(weights, shares, strict=True)) / fsum(weights)


def _counts(answered: Sequence[Answered]) -> dict[str, float]:
    """How many requests there were of each kind, and of what a reader must know."""
    kinds = Counter(one.kind for one in answered)
    counts: Mapping[str, int] = {
        "requests": len(answered),
        **{f"requests_{kind}": count for kind, count in kinds.items()},
        "requests_uncompressed": sum(one.whole for one in answered),
        "requests_truncated": sum(one.cut > 0 for one in answered),
        "requests_adjusted": sum(one.adjusted is not None for one in answered),
    }
    return {name: float(count) for name, count in counts.items()}


def _notes(run: RunConfig, loaded: LoadedModel, model: HarnessLM) -> list[str]:
    """What a reader must know about the requests, and what the method says at the shortest and longest."""
    counts = _counts(model.answered)
    of = f"of {len(model.answered)} requests"
    rolling = int(counts.get("requests_loglikelihood_rolling", 0))
    short = int(counts["requests_uncompressed"]) - rolling if run.method.uses_budget else 0
    found = [
        (rolling, f"{of} are rolling log-likelihoods: scored exactly, nothing is compressed"),
        (short, f"{of} had contexts so short that nothing was compressed"),
        (int(counts["requests_truncated"]), f"{of} were too long and lost their beginning"),
        (
            int(counts["requests_adjusted"]),
            f"{of} were too short for the budget and had the nearest feasible",
        ),
        (model.without_system, "chats lost their system message: the model's template takes none"),
    ]
    notes = [f"{count} {note}" for count, note in found if count]
    return [*notes, *_method_notes(run, loaded, model.answered)]


def _method_notes(run: RunConfig, loaded: LoadedModel, answered: Sequence[Answered]) -> list[str]:
    compressed = [one.generation.prompt_tokens[one.row] for one in answered if not one.whole]
    if not compressed:
        return []
    asked = budget_of(run)
    budgets = check_lengths(run.method, loaded.geometry, asked, set(compressed))
    ends = dict.fromkeys((min(compressed), max(compressed)))
    notes = [note for n in ends for note in run.method.notes(loaded.geometry, budgets[n], n)]
    return list(dict.fromkeys(notes))
