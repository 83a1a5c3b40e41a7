"""A second stream of work beside the main one: copies that nobody waits for yet.

On a CPU there is one stream, and work beside it is done at once. Nothing depends on when work is done, only
on where it is joined. Works inside a captured graph too, if what begins there is joined there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class Lane:
    """One stream of a device. Use `lane_of`: lanes of one name are the same stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self, *reads: Tensor) -> Iterator[None]:
        """Work in here begins after everything issued so far, and runs beside what follows.

        Args:
            reads: tensors that the caller may let go of before the work is done.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        if not torch.cuda.is_current_stream_capturing():
            for tensor in reads:
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What follows on the current stream begins after all work of this lane."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@cache
def lane_of(device: torch.device, name: str = "copies") -> Lane:
    """The lane of this name on a device."""
    return Lane(device)
