"""Full keys and values that wait outside the device store, and the manager that brings rows of them back.

Knows segments, rows and bytes; nothing of roles, drift or methods. Here host memory is pageable and copies
are plain; results never depend on when a copy happens, because the caller says at which step rows become
visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.cache.state import Bytes, no_bytes


@dataclass
class HostSegment:
    """One KV head's full prompt, out of the way: keys and values [n, D]."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both storages."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()


class OffloadManager:
    """Keeps full segments of one layer and fetches rows of them.

    Args:
        enabled: host memory; False keeps the segments on the device, with the same results.

    Attributes:
        moved_bytes: bytes fetched from host to device so far (0 where nothing crosses).
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.moved_bytes = 0
        self._segments: dict[tuple[int, int], HostSegment] = {}

    def store(self, sequence: int, head: int, keys: Tensor, values: Tensor) -> None:
        """Copy one head's [n, D] keys and values out; the caller's tensors may go."""
        target = torch.device("cpu") if self.enabled else keys.device
        parts = (
            torch.empty_like(x, device=target, memory_format=torch.contiguous_format) for x in (keys, values)
        )
        segment = HostSegment(*parts)
        segment.keys.copy_(keys)
        segment.values.copy_(values)
        self._segments[sequence, head] = segment

    def fetch(self, sequence: int, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [len(rows), D] of a stored segment, on the device of `rows`."""
        segment = self._segments[sequence, head]
        index = rows.to(segment.keys.device)
        keys, values = segment.keys[index], segment.values[index]
        if self.enabled:
            self.moved_bytes += 2 * keys.numel() * keys.element_size()
        return keys.to(rows.device), values.to(rows.device)

    def nbytes(self) -> Bytes:
        """Bytes of the stored segments, on the side where they are."""
        total = no_bytes()
        total["host" if self.enabled else "device"]["payload"] = sum(
            s.nbytes for s in self._segments.values()
        )
        return total
