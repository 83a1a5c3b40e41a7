"""Keys and values that wait outside the device store, and how rows of them are brought back.

Knows segments, rows and bytes; nothing of roles, drift or methods. Results never depend on when a copy
happens, because the caller says at which step rows become visible.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from hcache.cache.gather import copy_rows
from hcache.cache.state import Bytes, no_bytes
from hcache.cache.store import RaggedStore


class HostRows:
    """Rows of one layer in host memory, flat and ragged as the device store, and rows of them brought back.

    Pinned where the device is a GPU, so that a step gathers from it without synchronising.

    Args:
        lengths: rows of each of the S segments, s = b * H + h.
        like: a device tensor whose device, dtype and last dimension (D) the rows have.
        keys: whether keys wait here too, or values alone.
        enabled: False keeps the rows on the device, with the same results.
    """

    def __init__(self, lengths: list[int], like: Tensor, keys: bool = True, enabled: bool = True) -> None:
        self._offsets = [0, *accumulate(lengths)]
        self._crosses = enabled
        place = torch.device("cpu") if enabled else like.device
        shape = (self._offsets[-1], like.shape[-1])
        pinned = enabled and like.device.type == "cuda"
        buffers = [
            torch.empty(shape, dtype=like.dtype, device=place, pin_memory=pinned) for _ in range(1 + keys)
        ]
        self.values, self.keys = buffers[0], buffers[1] if keys else None
        self._moved = torch.zeros((), dtype=torch.int64, device=like.device)
        self.first = torch.tensor(self._offsets[:-1], device=like.device)

    def write(self, segment: int, keys: Tensor | None, values: Tensor) -> None:
        """Fill a segment from [n, D] tensors of the device; the caller's may go."""
        span = slice(self._offsets[segment], self._offsets[segment + 1])
        self.values[span].copy_(values)
        if self.keys is not None:
            assert keys is not None
            self.keys[span].copy_(keys)

    def load(self, rows: Tensor, target: RaggedStore, slots: Tensor, wanted: Tensor | None = None) -> None:
        """Write rows into slots of a store (values alone if there are no keys here); no synchronisation.

        Args:
            rows: [R] int64 flat rows, `first[s]` + the row within segment s.
            slots: [R] int64 flat rows of the store's buffers (RaggedStore.rows).
            wanted: [R] bool, rows to move; None for all.
        """
        copy_rows(self.values, rows, target.values, slots, wanted)
        if self.keys is not None:
            copy_rows(self.keys, rows, target.keys, slots, wanted)
        if self._crosses:
            self._moved += rows.numel() if wanted is None else wanted.sum()

    @property
    def moved_bytes(self) -> int:
        """Bytes brought back so far; 0 where nothing crosses. Synchronises."""
        return int(self._moved) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes that one row moves."""
        parts = 1 if self.keys is None else 2
        return parts * self.values.shape[1] * self.values.element_size()

    def nbytes(self) -> Bytes:
        """Bytes of the rows, on the side where they are, and of the tables on the device."""
        total = no_bytes()
        buffers = [self.values] if self.keys is None else [self.values, self.keys]
        total["host" if self._crosses else "device"]["payload"] = sum(
            x.untyped_storage().nbytes() for x in buffers
        )
        total["device"]["metadata"] = self.first.nbytes + self._moved.nbytes
        return total
