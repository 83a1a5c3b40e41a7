"""Timing of launches on the CUDA device at hand, for `runners.kernels`.

Calls are captured in a CUDA graph, so that the host's own time is left out, and rotate through buffers of
several times the L2 cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEADS, GROUP, DIM = 8, 4, 128
"""Of a layer of Llama-3.1-8B; keys and values are bfloat16."""

CACHES = 4
"""Buffers that the calls rotate through hold at least so many times the L2 cache."""

REPLAYS = 20

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One line of the table: microseconds a call over the replays, and the bytes that a call has to move."""

    what: str
    shape: str
    us: float
    us_p10: float
    us_p90: float
    nbytes: int

    @property
    def rate(self) -> str:
        return f"{self.nbytes / self.us * 1e-6:6.3f}" if self.nbytes else "     -"

    def line(self) -> str:
        spread = f"{self.us_p10:.1f} to {self.us_p90:.1f}"
        return f"{self.what:<30} {self.shape:<34} {self.us:9.1f}  {spread:>20}  {self.rate}"


def measure(what: str, shape: str, nbytes: int, calls: Sequence[Call], least: int = 32) -> Timing:
    """Time the calls in turn, at least `least` of them in one graph, REPLAYS times."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    turns = list(calls) * -(-least // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turns:
            call()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    us = torch.tensor([a.elapsed_time(b) for a, b in itertools.pairwise(marks)]) * 1e3 / len(turns)
    low, middle, high = us.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return Timing(what, shape, middle, low, high, nbytes)


def copies(nbytes: int) -> int:
    """Buffers of this size that hold CACHES times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-CACHES * cache // nbytes))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")
