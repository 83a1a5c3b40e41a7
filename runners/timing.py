"""Timing: calls by CUDA events, or by the clock where there is no GPU; medians and spreads.

Events are recorded around each call and read after the last one, so the device never waits to be timed; a
call that leaves the device idle is charged for it, as in real decoding.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch

from hcache.cache.offload import HostMemoryError
from runners.summary import mean, percentile

Spread = dict[str, float | None]


def call_times(call: Callable[[], object], repeats: int, warmup: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `repeats` calls, after `warmup` calls that nobody times."""
    for _ in range(warmup):
        call()
    synchronize(device)
    if device.type != "cuda":
        return [_wall(call) for _ in range(repeats)]
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    with torch.cuda.device(device):
        for start, end in marks:
            start.record()
            call()
            end.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in marks]


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def spread_of(values: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile, and the mean: rare slow steps show in that alone."""
    found: Spread = {name: percentile(values, q) for name, q in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))}
    return {**found, "mean": mean(values) if values else None}


def tokens_per_s(batch: int, times_ms: Sequence[float]) -> float:
    """Throughput of decode steps: slow ones count as what they take."""
    return 1e3 * batch / mean(times_ms)


def median_of(spread: Spread) -> float:
    """The median of a spread of measured values."""
    value = spread["median"]
    assert value is not None
    return value


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def begin_peak(device: torch.device) -> None:
    """Free what nobody holds and measure peak memory from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The largest number of bytes that was allocated since `begin_peak`; None without CUDA."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that device or host had too little memory (pinning: RuntimeError)."""
    if isinstance(error, (MemoryError, HostMemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
