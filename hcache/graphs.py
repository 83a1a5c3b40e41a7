"""Steps captured once and replayed: what makes decoding as fast as the device, and not as Python.

A step's kind says which operations it does (see hcache.cache.state.Turn). The first step of a kind runs as it
is, which also compiles its kernels; the second is captured into a CUDA graph; from then on it is replayed,
for later prompts too, as long as their states fit in the room of the first (hcache.cache.room).

Knows callables, streams and graphs; nothing of models or caches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

import torch

log = logging.getLogger(__name__)

Work = Callable[[], None]


class CaptureFailed(RuntimeError):
    """Work that can't be captured; nothing of it was done."""


def capture(work: Work) -> Work:
    """Record what `work` does on the device, without doing it; a callable that does it again and again."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except (
        Exception
    ) as error:  # whatever it is: the work is done uncaptured next, and raises again if it must
        _leave_capture()
        raise CaptureFailed((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
    return graph.replay


def _leave_capture() -> None:
    """Take torch's random generator out of the capture that broke off: one that ends well does."""
    empty = torch.cuda.CUDAGraph()
    with torch.cuda.graph(empty):
        torch.zeros(1, device="cuda")


class Graphs:
    """Work by kind: as it is the first time, captured the second, replayed from then on.

    Args:
        capture: makes a replay of work; tests put something else there.
        what: what is captured, for the log.

    Attributes:
        captures: times that captured work was thrown away and begun anew, and the first.
        warmup_ms: spent on first runs and on capturing so far.
    """

    def __init__(self, capture: Callable[[Work], Work] = capture, what: str = "step") -> None:
        self._capture, self._what = capture, what
        self._replays: dict[Hashable, Work] = {}
        self._tried: set[Hashable] = set()
        self.captures = 0
        self.warmup_ms = 0.0

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, kind: Hashable, work: Work) -> bool:
        """Do `work`, by its captured twin if there is one. True if it was a replay.

        Raises:
            CaptureFailed: `work` has not been done.
        """
        replay = self._replays.get(kind)
        if replay is not None:
            replay()
            return True
        start = _now()
        if kind not in self._tried:
            self._tried.add(kind)
            work()
        else:
            self.captures += not self._replays
            self._replays[kind] = self._capture(work)
            self._replays[kind]()
        self.warmup_ms += _now() - start
        if kind in self._replays:
            log.info("captured: %d kinds of %s so far", len(self._replays), self._what)
        return False

    def drop(self) -> None:
        """Forget what was captured: states have moved. Other shapes may compile other kernels, so first runs
        are due again.
        """
        self._replays.clear()
        self._tried.clear()


def _now() -> float:
    """Milliseconds, after all work on the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3
