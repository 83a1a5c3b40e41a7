"""What this machine can move at most, measured in the run that is held against it.

A large read-only sum, a copy on the device, and copies from and to pinned host memory. Buffers exceed every
cache; on a CPU they are small, and nothing crosses to a host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runners.timing import Spread, call_times, median_of, spread_of

_GPU_BYTES = 1 << 32
"""Read in a millisecond or so: a quarter of that was seen to measure 4% less, for what a launch takes."""

_CPU_BYTES = 1 << 25
_HOST_BYTES = 1 << 30
_REPEATS = 20
_WARMUP = 3


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second, as spreads over repeats; host copies are None without a GPU.

    Args:
        read_bytes_per_s: of a sum that only reads.
        copy_bytes_per_s: read and written bytes of a copy on the device together.
        host_to_device_bytes_per_s, device_to_host_bytes_per_s: of pinned memory.
        buffer_bytes: read in one call.
    """

    read_bytes_per_s: Spread
    copy_bytes_per_s: Spread
    host_to_device_bytes_per_s: Spread | None
    device_to_host_bytes_per_s: Spread | None
    buffer_bytes: int

    def floor_ms(self, read_bytes: float) -> float:
        """The least time in which so many bytes can be read, at the median measured bandwidth."""
        return 1e3 * read_bytes / median_of(self.read_bytes_per_s)


def measure_ceilings(device: torch.device, buffer_bytes: int | None = None) -> Ceilings:
    """Measure them now, on `device`; takes two buffers of memory while it runs."""
    size = buffer_bytes or (_GPU_BYTES if device.type == "cuda" else _CPU_BYTES)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def rates(call: Callable[[], object], moved: int) -> Spread:
        times = call_times(call, _REPEATS, _WARMUP, device)
        return spread_of([1e3 * moved / ms for ms in times])

    read = rates(source.sum, source.nbytes)
    copied = rates(lambda: target.copy_(source), 2 * source.nbytes)
    if device.type != "cuda":
        return Ceilings(read, copied, None, None, source.nbytes)
    source_part, target_part = source[: _HOST_BYTES // 4], target[: _HOST_BYTES // 4]
    host = torch.empty(source_part.shape, dtype=source.dtype, pin_memory=True)
    up = rates(lambda: target_part.copy_(host, non_blocking=True), host.nbytes)
    down = rates(lambda: host.copy_(source_part, non_blocking=True), host.nbytes)
    return Ceilings(read, copied, up, down, source.nbytes)
