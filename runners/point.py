"""One point of a latency cell: one method at one budget, context and batch, in figures.

Knows the Generator's interface and the ceilings; nothing of records on disk, of sweeps or of transformers'
caches. What can't run is a point that says why.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hcache.budget import Budget, InfeasibleBudget
from hcache.cache.offload import check_host_memory
from hcache.engine import EngineSettings, Generator
from hcache.geometry import Geometry
from hcache.models import LoadedModel
from runners.ceilings import Ceilings
from runners.latency_settings import WARMUP_ROUNDS, LatencySettings
from runners.timing import begin_peak, is_out_of_memory, median_of, peak_bytes, spread_of, tokens_per_s

log = logging.getLogger(__name__)
Point = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is measured: everything a point depends on but context and batch.

    Args:
        loaded: the model.
        method: as it runs (profile and drift filled in).
        budget: None for a method that ignores it.
        settings: of the runner.
        engine: how our steps are run.
        ceilings: of this run.
        seed: of random keys, values and tokens.
    """

    loaded: LoadedModel
    method: Any
    budget: Budget | None
    settings: LatencySettings
    engine: EngineSettings
    ceilings: Ceilings
    seed: int


def measure_point(task: Task, context: int, batch: int, ids: Tensor | None) -> Point:
    """The figures of one point, or why there are none; never raises for what a point can't do.

    Args:
        ids: [batch, context] prompt; None fills the cache with random keys and values.
    """
    base: Point = {"context": context, "batch": batch}
    try:
        impossible = infeasible(task, context)
        if impossible:
            return {**base, **impossible}
        base |= floor_of(task, context, batch)
        check_host_memory(batch * _usage(task, context).host_bytes)
        return {**base, "status": "completed", **_measured(task, context, batch, ids, base)}
    except Exception as error:  # one point's failure leaves the others to be measured
        if is_out_of_memory(error):
            return {**base, "status": "out_of_memory", "message": _short(error)}
        log.warning("%d x %d failed: %s", context, batch, _short(error))
        trace = "".join(traceback.format_exception(error))
        return {**base, "status": "failed", "message": _short(error), "traceback": trace}


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def infeasible(task: Task, context: int) -> Point | None:
    """Why a point can't be, known before anything is allocated; None where it can."""
    needed, loaded = context + task.settings.new_tokens(), task.loaded
    if needed > loaded.context_tokens:
        message = f"needs {needed} positions with its new tokens, {loaded.name} has {loaded.context_tokens}"
        return {"status": "infeasible", "message": message}
    try:
        _usage(task, context)
    except InfeasibleBudget as error:
        return {
            "status": "infeasible",
            "message": str(error),
            "smallest_fraction": error.smallest_fraction,
            "smallest_tokens": error.smallest_tokens,
        }
    return None


def _usage(task: Task, context: int) -> Any:
    """What the method plans for one sequence. Raises InfeasibleBudget."""
    budget = task.budget or Budget(kept_fraction=1.0)
    return task.method.usage(task.loaded.geometry, budget, context, task.loaded.model.dtype.itemsize)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters that a decode step reads.

    All but the embedding, of which a step reads a row a sequence, unless it is the output projection too.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    skipped = None if isinstance(head, nn.Module) and head.weight is embedding else embedding
    return sum(p.nbytes for p in model.parameters() if p is not skipped)


def full_kv_bytes(geometry: Geometry, tokens: int, number_bytes: int) -> int:
    """Keys and values of so many tokens in every layer and head."""
    return 2 * geometry.heads * geometry.head_dim * tokens * number_bytes


def floor_of(task: Task, context: int, batch: int) -> Point:
    """The least that the budget lets a step read, and the least time in which it can be read.

    What a method happens to read on top is its own affair: a method is held against its budget.
    """
    model = task.loaded.model
    kept = context if task.budget is None else min(task.budget.tokens(context), context)
    weights = weight_bytes(model)
    kv = batch * full_kv_bytes(task.loaded.geometry, kept, model.dtype.itemsize)
    return {
        "weights_bytes": weights,
        "budget_kv_bytes": kv,
        "floor_bytes": weights + kv,
        "floor_ms": task.ceilings.floor_ms(weights + kv),
    }


def _measured(task: Task, context: int, batch: int, ids: Tensor | None, floor: Point) -> Point:
    settings, device = task.settings, task.loaded.device
    begin_peak(device)
    session, prefill_ms = _begun(task, context, batch, ids)
    _warm_up(session, settings)
    before = session.counters()
    times = session.decode(settings.steps)
    counted, peak = session.counters(), peak_bytes(device)
    decode_ms = spread_of(times)
    median = median_of(decode_ms)
    return {
        "prefill_ms": prefill_ms,
        "decode_ms": decode_ms,
        "measured_steps": len(times),
        "tokens_per_s": tokens_per_s(batch, times),
        "times_floor": median / floor["floor_ms"],
        **_bytes(session, floor),
        "host_to_device_bytes_per_step": _gained("host_to_device_bytes", before, counted) / settings.steps,
        "peak_device_bytes": peak,
        **_drift(before, counted),
        "engine": dict(session.engine),
    }


def _warm_up(session: Any, settings: LatencySettings) -> None:
    """Steps that nobody times, until a round of them has neither compiled nor captured anything.

    Steps come in kinds, some of them rare (the end of a window), and each kind is captured by itself.
    """
    for _ in range(WARMUP_ROUNDS):
        if len(session.decode(settings.warmup)) == settings.warmup:
            return


def _begun(task: Task, context: int, batch: int, ids: Tensor | None) -> tuple[Any, Any]:
    """A session after its prompt, and the spread of prefill times where there were any."""
    settings = task.settings
    generator = Generator(
        task.loaded.model,
        method=task.method,
        budget=task.budget,
        backend=task.loaded.spec.attention,
        runtime=task.engine,
    )
    room = settings.new_tokens()
    if ids is None:
        return generator.begin_filled(context, batch, max_new_tokens=room, seed=task.seed), None
    times: list[float] = []
    for _ in range(1 + settings.prefills):
        session: Any = None  # gone before the next one takes its memory
        session = generator.begin(ids, max_new_tokens=room)
        times.append(session.prefill_ms)
    return session, spread_of(times[1:])


def _bytes(session: Any, floor: Point) -> Point:
    """Measured bytes: what lies where, and what a step attends to."""
    memory = session.memory
    attended = round(session.cache.attended_fraction() * memory.full_kv_bytes)
    return {
        "full_kv_bytes": memory.full_kv_bytes,
        "resident_kv_bytes": memory.device_payload + memory.device_metadata,
        "metadata_bytes": memory.device_metadata,
        "host_kv_bytes": memory.host_payload,
        "attended_kv_bytes": attended,
        "read_bytes": floor["weights_bytes"] + attended,
    }


def _gained(name: str, before: dict[str, float], after: dict[str, float]) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def _drift(before: dict[str, float], after: dict[str, float]) -> Point:
    """Windows that ended in the measured steps and the share that drifted; nothing without windows."""
    if "windows" not in after:
        return {}
    windows, triggers = _gained("windows", before, after), _gained("triggers", before, after)
    return {"windows": windows, "triggers": triggers, "drift_rate": triggers / windows if windows else None}
