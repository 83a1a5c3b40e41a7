"""From the lines of `predictions.jsonl` to the measured part of `result.json`.

Pure functions of the lines: no clock, no model, no configuration. Lines come in their canonical order, and
sums are exactly rounded, so an unbroken run and a resumed one give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hcache.metrics import Tree, tree_ci, tree_mean, tree_size, wilson
from hcache.records import Line


def summarise(
    lines: Sequence[Line], requested: Mapping[str, Any], aggregates: Mapping[str, Tree] | None = None
) -> dict[str, Any]:
    """The measured part of result.json, from finished lines in their canonical order (sums depend on it).

    requested: the budget as asked for, `requested_fraction` and `requested_tokens`. aggregates: the
    benchmark's own averages as trees of scores. `score` is left to the caller, who knows which of them it is.
    Raises ValueError for no lines.
    """
    if not lines:
        raise ValueError("no example was run: benchmark.limit and benchmark.tasks leave nothing to do")
    memory = _memory(lines)
    counters = _counters(lines)
    budget = {
        **requested,
        "resident_fraction": memory["device_kv_bytes"] / memory["full_kv_bytes"],
        "attended_fraction": counters.get("attended_fraction"),
        "adjusted_examples": sum(line["adjusted_budget_tokens"] is not None for line in lines),
    }
    return {
        "tasks": {task: _task(lines, task) for task in dict.fromkeys(line["task"] for line in lines)},
        "aggregates": {name: aggregate(tree) for name, tree in (aggregates or {}).items()},
        "budget": budget,
        "memory": memory,
        "latency": _latency(lines),
        "engine": _engine(lines),
        "counters": counters,
    }


def _task(lines: Sequence[Line], task: str) -> dict[str, Any]:
    own = [line for line in lines if line["task"] == task]
    score = mean([line["score"] for line in own])
    low, high = wilson(score, len(own))
    ci95 = [100 * low, 100 * high]
    return {"metric": own[0]["metric"], "score": 100 * score, "n": len(own), "ci95": ci95}


def aggregate(tree: Tree) -> dict[str, Any]:
    """An average of a benchmark, 0 to 100, with its bootstrap interval."""
    low, high = tree_ci(tree, seed=0)
    return {"score": 100 * tree_mean(tree), "n": tree_size(tree), "ci95": [100 * low, 100 * high]}


def _memory(lines: Sequence[Line]) -> dict[str, Any]:
    """Bytes per example: means over examples; the peak is the largest of any batch."""
    parts = [line["memory"] for line in lines]
    peaks = [part["peak_device_bytes"] for part in parts if part["peak_device_bytes"] is not None]
    return {
        "device_kv_bytes": mean([part["device_payload"] + part["device_metadata"] for part in parts]),
        "device_metadata_bytes": mean([part["device_metadata"] for part in parts]),
        "device_reserved_bytes": mean([part["device_reserved"] for part in parts]),
        "full_kv_bytes": mean([part["full_kv_bytes"] for part in parts]),
        "host_kv_bytes": mean([part["host_payload"] for part in parts]),
        "peak_device_bytes": max(peaks) if peaks else None,
    }


def _counters(lines: Sequence[Line]) -> dict[str, float]:
    """Fractions are averaged, everything else is summed."""
    names = dict.fromkeys(name for line in lines for name in line["counters"])
    totals: dict[str, float] = {}
    for name in names:
        values = [line["counters"][name] for line in lines if name in line["counters"]]
        totals[name] = mean(values) if name.endswith("_fraction") else math.fsum(values)
    return totals


def _latency(lines: Sequence[Line]) -> dict[str, Any]:
    """Of each example; `tokens_per_s` is decoding's throughput, all sequences of a batch together."""
    stepped = [line for line in lines if line["decode_steps"]]
    fed = math.fsum(line["counters"].get("fed_tokens", line["decode_steps"]) for line in lines)
    moved = math.fsum(line["counters"].get("host_to_device_bytes", 0.0) for line in lines)
    return {
        "prefill_ms": spread([line["prefill_ms"] for line in lines]),
        "decode_ms_per_token": spread([line["decode_ms"] / line["decode_steps"] for line in stepped]),
        "tokens_per_s": _throughput(stepped),
        "host_to_device_bytes_per_token": moved / max(fed, 1),
    }


def _engine(lines: Sequence[Line]) -> dict[str, Any]:
    """How steps were run; `name` is mixed where a resumed or failed capture made it differ."""
    engines = [line["engine"] for line in lines if "engine" in line]
    batches = {_generation(line): line["warmup_ms"] for line in lines if "warmup_ms" in line}
    found: dict[str, Any] = {"warmup_ms": math.fsum(batches.values())}
    for key in ("name", "backend", "compile"):
        values = list(dict.fromkeys(engine[key] for engine in engines))
        found[key] = values[0] if len(values) == 1 else "mixed" if values else None
    found["captures"] = max((engine["captures"] for engine in engines), default=0)
    found["reasons"] = list(dict.fromkeys(engine["reason"] for engine in engines if engine["reason"]))
    return found


def _throughput(stepped: Sequence[Line]) -> float | None:
    """Decoded tokens per second; a batch decodes side by side and takes as long as its longest sequence."""
    batch_ms: dict[Any, float] = {}
    for line in stepped:
        batch_ms[_generation(line)] = max(batch_ms.get(_generation(line), 0.0), line["decode_ms"])
    total_ms = math.fsum(batch_ms.values())
    return 1000 * sum(line["decode_steps"] for line in stepped) / total_ms if total_ms else None


def _generation(line: Line) -> tuple[int, str]:
    """What decoded side by side: a batch, or the part of one that memory had room for."""
    return line["batch"], line.get("halved", "")


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, exactly rounded, so that the order of the lines can't show."""
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Median, 10th and 90th percentile (linear interpolation); None where nothing was measured."""
    return {name: percentile(values, q) for name, q in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))}


def percentile(values: Sequence[float], quantile: float) -> float | None:
    """The `quantile` (0 to 1) of `values` with linear interpolation, or None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = quantile * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
