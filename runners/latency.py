"""runner=latency: how long a decode step takes, at which contexts and batches, against what is possible.

One cell is a model, a method and a budget; its points are contexts x batches. Each point holds the method's
figures beside the ceilings of this machine and the baselines of the same run, which the cells of a sweep
share, as they share the loaded model. Points are on disk as soon as they are measured; the same command goes
on after the last one. Knows no method by name.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcache import records
from hcache.budget import Budget
from hcache.engine import EngineSettings
from hcache.methods import make
from hcache.records import Predictions, Result
from runners import CellOutcome, loading
from runners.baselines import TRANSFORMERS, measure_baseline
from runners.ceilings import Ceilings, measure_ceilings
from runners.config import RunConfig, budget_of
from runners.interrupt import Interrupted, StopSignal
from runners.latency_settings import (
    DRIFT_EVERY,
    Baseline,
    LatencySettings,
    PromptKind,
    check_latency,
    drift_of,
    settings_of,
)
from runners.latency_table import show_cell
from runners.lock import CellBusy, locked
from runners.needle import needle_ids
from runners.plan import PlannedCell, planned
from runners.point import Point, Task, floor_of, infeasible, measure_point
from runners.result import head, is_done, requested
from runners.synthetic import with_profile
from runners.timing import median_of
from runners.tracking import make_tracker

log = logging.getLogger(__name__)
POINTS_FILE = "points.jsonl"
_started = records.now()
_shared: dict[Any, Any] = {}
"""What the cells of this process share: ceilings and baselines, by model, settings, context and batch."""


class Points(Predictions):
    """The points of one cell as they are measured, one line each."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / POINTS_FILE


def run(config: RunConfig) -> CellOutcome:
    """Measure one cell, or read back what an earlier run of it left."""
    plan = planned(config)
    stored = records.read_result(plan.directory)
    if stored is not None and is_done(stored, None):
        log.info("%s is done, read back", plan.directory)
        show_cell(stored)
        return CellOutcome(stored["status"], plan.directory)
    try:
        with StopSignal() as stop, locked(plan.directory):
            return _outcome(plan, stop)
    except CellBusy as busy:
        return CellOutcome("busy", plan.directory, str(busy))


def _outcome(plan: PlannedCell, stop: StopSignal) -> CellOutcome:
    try:
        result = _cell(plan, stop)
    except Interrupted:
        return CellOutcome("interrupted", plan.directory, "stopped; the same command goes on from here")
    except (Exception, SystemExit) as error:
        result = _failed(plan, error)
        records.write_result(plan.directory, result)
    show_cell(result)
    message = result["error"]["message"] if "error" in result else ""
    return CellOutcome(result["status"], plan.directory, message)


def _cell(plan: PlannedCell, stop: StopSignal) -> Result:
    """The cell's record, written; the tracker is told when it is there."""
    check_latency(plan.run)
    tracker = make_tracker(plan.run.tracker, plan.cell, plan.directory)
    tracker.start(plan.config, [])
    result = None
    try:
        result = _measure(plan, stop)
        records.write_result(plan.directory, result)
    finally:
        tracker.finish(result, [])
    return result


def _measure(plan: PlannedCell, stop: StopSignal) -> Result:
    settings = settings_of(plan.run.latency)
    file = Points(plan.directory)
    done = {point["id"]: point for point in file.load() if point["status"] != "failed"}
    pending = [pair for pair in _pairs(settings) if _id(*pair) not in done]
    for point in _points(plan.run, settings, pending, stop):
        file.append([point])
        done[point["id"]] = point
    return _record(plan, [done[_id(*pair)] for pair in _pairs(settings)])


def _points(
    run: RunConfig, settings: LatencySettings, pending: Sequence[tuple[int, int]], stop: StopSignal
) -> Iterator[Point]:
    """What is still to be measured, point by point; nothing is loaded if that is nothing."""
    stop.check()
    if not pending:
        return
    bench = _Bench(run, settings)
    # All baselines before our engine has touched the model, as far as this cell knows what is coming.
    for pair in pending:
        stop.check()
        bench.baselines(*pair)
    for pair in pending:
        stop.check()
        yield bench.point(*pair)


def _pairs(settings: LatencySettings) -> Iterator[tuple[int, int]]:
    """Contexts and batches in the order in which they are measured: the small ones first."""
    for batch in sorted(settings.batches):
        for context in sorted(settings.contexts):
            yield context, batch


def _id(context: int, batch: int) -> str:
    return f"{context}x{batch}"


class _Bench:
    """The loaded model, what this run has measured of it, and the method to be measured."""

    def __init__(self, run: RunConfig, settings: LatencySettings) -> None:
        if run.runtime.threads is not None:
            torch.set_num_threads(run.runtime.threads)
        self._run, self._settings = run, settings
        spec = cut(run, settings).model
        self._loaded = loading.loaded(cut(run, settings))
        self._key = (spec, run.runtime.device)
        if _shared.get("key") != self._key:
            _shared.clear()
            _shared["key"] = self._key
        self.device_name = loading.device_name(self._loaded)
        method, self.notes = with_profile(run.method, spec, self._loaded.geometry)
        drift = drift_of(run)
        if drift is not None and DRIFT_EVERY[drift] is not None:
            method = dataclasses.replace(method, drift_every=DRIFT_EVERY[drift])
        budget = budget_of(run) if method.uses_budget else None
        self._task = self._task_of(method, budget)

    def _task_of(self, method: Any, budget: Budget | None) -> Task:
        runtime = self._run.runtime
        engine = EngineSettings.of(runtime.graphs, runtime.compile)
        return Task(self._loaded, method, budget, self._settings, engine, self.ceilings, runtime.seed)

    @property
    def ceilings(self) -> Ceilings:
        """Of this process."""
        if "ceilings" not in _shared:
            log.info("measuring what the device can move")
            _shared["ceilings"] = measure_ceilings(self._loaded.device)
        found: Ceilings = _shared["ceilings"]
        return found

    def baselines(self, context: int, batch: int) -> dict[str, Point]:
        """Those asked for at one point, measured the first time this process is asked.

        None of them where the method itself can't be.
        """
        if infeasible(self._task, context) is not None:
            return {}
        return {
            kind.value: self._baseline(kind, context, batch)
            for kind in self._settings.baselines
            if not (kind is Baseline.fullkv and self._is_fullkv())
        }

    def _is_fullkv(self) -> bool:
        return bool(self._task.method == make("fullkv"))

    def _baseline(self, kind: Baseline, context: int, batch: int) -> Point:
        key = self._shared_key(kind, context, batch)
        if key not in _shared:
            log.info("baseline %s at %d tokens x %d", kind.value, context, batch)
            full = self._task_of(make("fullkv"), None)
            if kind is Baseline.fullkv:
                _shared[key] = _as_baseline(measure_point(full, context, batch, self._ids(context, batch)))
            else:
                ids = self._ids(context, batch)
                found = measure_baseline(kind, self._loaded, self._settings, context, batch, ids)
                _shared[key] = _against_floor(found, floor_of(full, context, batch))
        kept: Point = _shared[key]
        return kept

    def _shared_key(self, kind: Baseline, context: int, batch: int) -> tuple[Any, ...]:
        settings = dataclasses.replace(self._settings, contexts=[context], batches=[batch], baselines=[])
        return kind, str(dataclasses.asdict(settings)), str(self._run.runtime)

    def point(self, context: int, batch: int) -> Point:
        """One measured point, with everything of this run that it is held against."""
        started, clock = records.now(), time.perf_counter()
        log.info("%s at %d tokens x %d", self._run.method.name, context, batch)
        baselines = self.baselines(context, batch)
        point = measure_point(self._task, context, batch, self._ids(context, batch))
        if self._is_fullkv():
            _shared[self._shared_key(Baseline.fullkv, context, batch)] = _as_baseline(point)
        return {
            "task": "latency",
            "id": _id(context, batch),
            **point,
            **_speedup(point, baselines),
            "layers": self._loaded.geometry.layers,
            "ceilings": dataclasses.asdict(self.ceilings),
            "baselines": baselines,
            "notes": self._notes(context),
            "started": started,
            "seconds": round(time.perf_counter() - clock, 3),
            "run": {"started": _started, "process": os.getpid(), "device": self.device_name},
        }

    def _notes(self, context: int) -> list[str]:
        budget = self._task.budget or Budget(kept_fraction=1.0)
        try:
            return [*self.notes, *self._task.method.notes(self._loaded.geometry, budget, context)]
        except ValueError:  # the point says what it is about
            return self.notes

    def _ids(self, context: int, batch: int) -> Tensor | None:
        """The prompt [batch, context]; None for a cache that is filled."""
        kind = self._settings.prompt
        if kind is PromptKind.filled:
            return None
        if kind is PromptKind.needle:
            return needle_ids(self._loaded.tokenizer, context, batch)
        draw = torch.Generator().manual_seed(self._run.runtime.seed)
        words = self._loaded.model.config.get_text_config().vocab_size
        return torch.randint(words, (batch, context), generator=draw)


def cut(run: RunConfig, settings: LatencySettings) -> RunConfig:
    """The run with fewer layers, where `latency.layers` asks for that."""
    if settings.layers is None:
        return run
    assert run.model.shape is not None
    shape = dataclasses.replace(run.model.shape, layers=settings.layers)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, shape=shape))


def _as_baseline(point: Point) -> Point:
    """A point of FullKV as others hold it beside theirs."""
    return {key: value for key, value in point.items() if key not in ("context", "batch", "traceback")}


def _against_floor(baseline: Point, floor: Point) -> Point:
    """A baseline with its ratio to the floor of the full cache."""
    if baseline["status"] != "completed":
        return baseline
    ratio = median_of(baseline["decode_ms"]) / floor["floor_ms"]
    return {**baseline, "floor_ms": floor["floor_ms"], "times_floor": ratio}


def _speedup(point: Point, baselines: dict[str, Point]) -> Point:
    """The headline: the fastest of transformers' own over the method, both of this run."""
    names = [kind.value for kind in TRANSFORMERS]
    ran = {n: baselines[n] for n in names if baselines.get(n, {}).get("status") == "completed"}
    if not ran:
        return {"fastest_baseline": None, "speedup": None}
    fastest = min(ran, key=lambda name: median_of(ran[name]["decode_ms"]))
    if point["status"] != "completed":
        return {"fastest_baseline": fastest, "speedup": None}
    ratio = median_of(ran[fastest]["decode_ms"]) / median_of(point["decode_ms"])
    return {"fastest_baseline": fastest, "speedup": ratio}


# --- the record


def _record(plan: PlannedCell, points: list[Point]) -> Result:
    """A cell fails if a point did, and is infeasible if every point is; memory that lacks is a result."""
    statuses = {point["status"] for point in points}
    failed = next((point for point in points if point["status"] == "failed"), None)
    status = "failed" if failed else "infeasible" if statuses == {"infeasible"} else "completed"
    drift = drift_of(plan.run)
    result = {
        **head(plan, status),
        "budget": requested(plan),
        "latency": {
            "drift": drift.value if drift else None,
            "points": [{k: v for k, v in point.items() if k not in ("task", "notes")} for point in points],
        },
        "notes": list(dict.fromkeys(note for point in points for note in point["notes"])),
        "provenance": _provenance(plan, points),
    }
    reason = failed or (points[-1] if status == "infeasible" else None)
    if reason is not None:
        known = ("message", "smallest_fraction", "smallest_tokens", "traceback")
        kind = "InfeasibleBudget" if status == "infeasible" else "PointFailed"
        result["error"] = {"type": kind, **{k: reason[k] for k in known if k in reason}}
    return result


def _provenance(plan: PlannedCell, points: list[Point]) -> dict[str, Any]:
    device = points[-1]["run"]["device"]
    started = min(point["started"] for point in points)
    seconds = sum(point["seconds"] for point in points)
    return records.provenance(device, started, seconds, plan.run.runtime.seed)


def _failed(plan: PlannedCell, error: BaseException) -> Result:
    """A cell that couldn't begin."""
    message = str(error) or type(error).__name__
    trace = "".join(traceback.format_exception(error))
    log.warning("%s failed: %s", plan.directory, message)
    return {
        **head(plan, "failed"),
        "budget": requested(plan),
        "error": {"type": type(error).__name__, "message": message, "traceback": trace},
        "latency": {"points": []},
        "provenance": records.provenance(None, records.now(), 0.0, plan.run.runtime.seed),
    }
