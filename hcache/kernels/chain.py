"""Kernels that start while the one before them ends: programmatic dependent launch, from Hopper on.

Between two kernels of a stream the memory idles for some microseconds: the last programs of one finish,
the next one is launched, its first loads are on their way. A kernel of a chain is launched as soon as all
programs of the one before it have called `leave` or ended, and waits in `enter`, before it touches anything.
After that all earlier kernels are done: the one right before it could not end without having waited itself.
Kernels that know nothing of this may stand between.

Small kernels leave at once, others when they have asked for all they read: programs of the next one that come
earlier settle where room is first, several to one SM, and the whole takes a fifth longer (LOG.md).

CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; griddepcontrol in PTX.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
import triton.language as tl

_broken = False
"""Inside `unchained`."""


def chained(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch in a chain: whether the kernel is told (`chain`), and how it is launched.

    False where the device can't do it.
    """
    able = _able(device) and not _broken
    return {"chain": able, "launch_pdl": able}


@contextmanager
def unchained() -> Iterator[None]:
    """Launches in here wait for the kernel before them to end: to measure what a chain is worth."""
    global _broken
    before, _broken = _broken, True
    try:
        yield
    finally:
        _broken = before


@cache
def _able(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def enter(chain: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until all earlier kernels are done and their results seen."""
    if chain:
        tl.extra.cuda.gdc_wait()


@triton.jit
def leave(chain: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel be launched."""
    if chain:
        tl.extra.cuda.gdc_launch_dependents()
