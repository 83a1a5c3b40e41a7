"""Time and flags of a device, read without holding it up: CUDA events on a GPU, the wall's clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


class Clock:
    """The clock of one device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"

    def now(self) -> float:
        """Milliseconds, after all work on the device is done."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter() * 1e3

    def lap(self) -> Callable[[], Callable[[], float]]:
        """Start a lap. Call the result to end it, and what that gives for its milliseconds, which waits."""
        if not self._cuda:
            start = time.perf_counter()

            def end() -> Callable[[], float]:
                taken = (time.perf_counter() - start) * 1e3
                return lambda: taken

            return end
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()

        def record() -> Callable[[], float]:
            last.record()

            def read() -> float:
                last.synchronize()
                return first.elapsed_time(last)

            return read

        return record

    def flag(self, value_1: Tensor) -> Callable[[], bool]:
        """A copy of a [1] bool as the work issued so far leaves it; the result waits for that work alone."""
        if not self._cuda:
            seen = bool(value_1)
            return lambda: seen
        copy = torch.empty(1, dtype=torch.bool, pin_memory=True)
        copy.copy_(value_1, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def read() -> bool:
            done.synchronize()
            return bool(copy)

        return read
