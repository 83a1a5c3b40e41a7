"""Keys and values that wait outside the device store, and how rows of them are brought back.

Knows segments, rows and bytes; nothing of roles, drift or methods. Results never depend on when a copy
happens: the caller says where the filling must be over (`settle`), and at which step rows become visible.
"""

from __future__ import annotations

import logging
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hcache.cache.gather import PROGRAMS, copy_lists, copy_rows
from hcache.cache.lane import lane_of
from hcache.cache.room import Held, Room
from hcache.cache.state import Bytes, no_bytes

log = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
GIB = 2**30


class HostMemoryError(ValueError):
    """What a run would keep in host memory does not fit there."""


def check_host_memory(needed_bytes: int) -> None:
    """Refuse a run whose host buffers won't fit, before it starts.

    Where the system doesn't say what is available (no /proc/meminfo), the log says that nothing is checked.

    Raises:
        HostMemoryError: more is needed than is available, with the figures.
    """
    if needed_bytes <= 0:
        return
    needed = f"{needed_bytes / GIB:.1f} GiB"
    available = _available_bytes()
    if available is None:
        log.info("%s of offloaded KV may not fit host memory: no MemAvailable in %s", needed, MEMINFO)
    elif needed_bytes > available:
        raise HostMemoryError(
            f"offloaded KV needs {needed} of host memory, {available / GIB:.1f} GiB are available; use "
            "shorter prompts or a smaller batch, or keep it on the device (method.offload.enabled=false)"
        )


def _available_bytes() -> int | None:
    """MemAvailable of the system; None where it can't be read."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    kib = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kib[0]) if kib else None


class KeyValues(Protocol):
    """Where rows go: flat [slots, D] buffers."""

    keys: Tensor
    values: Tensor


class HostRows(Held):
    """Rows of one layer in host memory, flat and ragged as the device store, and rows of them brought back.

    Pinned where the device is a GPU. Filling then runs on a stream of its own, beside the rest of the
    prefill: `settle` once before the first `load`. A step gathers from here without synchronising.

    Args:
        lengths: rows of each of the S segments, s = b * H + h.
        like: a device tensor whose device, dtype and last dimension (D) the rows have.
        keys: whether keys wait here too, or values alone.
        enabled: False keeps the rows on the device, with the same results.
        room: gives the buffers, which may be larger and are used again for the next prompt.

    Attributes:
        first: [S] int64 on the device, flat row at which each segment begins.
    """

    def __init__(
        self,
        lengths: list[int],
        like: Tensor,
        keys: bool = True,
        enabled: bool = True,
        room: Room | None = None,
    ) -> None:
        self._offsets = [0, *accumulate(lengths)]
        self._crosses, self._device = enabled, like.device
        shape = (self._offsets[-1], like.shape[-1])
        room = room if room and shape[0] else Room()
        self.values = room.buffer("waiting_values", shape, like, pinned=enabled)
        self.keys = room.buffer("waiting_keys", shape, like, pinned=enabled) if keys else None
        self._loaded = torch.zeros((), dtype=torch.int64, device=like.device)
        self.first = torch.tensor(self._offsets[:-1], device=like.device)

    def write(self, segment: int, keys: Tensor | None, values: Tensor) -> None:
        """Fill a segment from [n, D] tensors of the device, beside what follows; the caller's may go."""
        span = slice(self._offsets[segment], self._offsets[segment + 1])
        assert (keys is None) == (self.keys is None)
        with lane_of(self._device, "fill").beside(*(x for x in (keys, values) if x is not None)):
            self.values[span].copy_(values, non_blocking=True)
            if self.keys is not None and keys is not None:
                self.keys[span].copy_(keys, non_blocking=True)

    def settle(self) -> None:
        """What follows on the current stream finds every segment filled. Not inside a captured step."""
        lane_of(self._device, "fill").join()

    def load(
        self,
        rows: Tensor,
        target: KeyValues,
        slots: Tensor,
        wanted: Tensor | None = None,
        programs: int = PROGRAMS,
    ) -> None:
        """Write rows into slots of a store (values alone if there are no keys here); no synchronisation.

        Args:
            rows: [R] int64 flat rows, `first[s]` + the row within segment s.
            slots: [R] int64 flat rows of the target's buffers; those of wanted rows are all different.
            wanted: [R] bool, rows to move; None for all.
            programs: see copy_rows.
        """
        copy_rows(self._pairs(target), rows, slots, wanted, programs, self._loaded)

    def load_lists(
        self,
        counts_Q: Tensor,
        listed_QK: Tensor,
        first_Q: Tensor,
        target: KeyValues,
        target_first_Q: Tensor | None = None,
        programs: int = PROGRAMS,
    ) -> None:
        """Write the first `counts_Q[q]` listed rows of each list next to each other; no synchronisation.

        Args:
            counts_Q: [Q] int64.
            listed_QK: int32, rows within a segment; the others of a list exist there, too.
            first_Q: [Q] int64, `first[s]` of each list's segment.
            target_first_Q: [Q] int64, where each list goes in the target's buffers; K * q if None.
            programs: see copy_rows.
        """
        copy_lists(
            self._pairs(target), counts_Q, listed_QK, source_first_Q=first_Q,
            target_first_Q=target_first_Q, programs=programs, count=self._loaded,
        )  # fmt: skip

    def _pairs(self, target: KeyValues) -> list[tuple[Tensor, Tensor]]:
        pairs = [(self.values, target.values)]
        if self.keys is not None:
            pairs.append((self.keys, target.keys))
        return pairs

    @property
    def loaded_rows(self) -> int:
        """Rows brought back so far, from wherever they wait. Synchronises."""
        return int(self._loaded)

    @property
    def moved_bytes(self) -> int:
        """Bytes brought back over the bus so far; 0 where nothing crosses. Synchronises."""
        return self.loaded_rows * self.row_bytes if self._crosses else 0

    @property
    def row_bytes(self) -> int:
        """Bytes that one row moves."""
        parts = 1 if self.keys is None else 2
        return parts * self.values.shape[1] * self.values.element_size()

    def nbytes(self) -> Bytes:
        """Rows and what is left of their buffers, on the side where they are; tables on the device."""
        total = no_bytes()
        buffers = [self.values] if self.keys is None else [self.values, self.keys]
        side = total["host" if self._crosses else "device"]
        side["payload"] = self._offsets[-1] * self.row_bytes
        side["reserved"] = sum(x.untyped_storage().nbytes() for x in buffers) - side["payload"]
        total["device"]["metadata"] = self.first.nbytes + self._loaded.nbytes
        return total
