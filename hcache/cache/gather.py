"""Copy single rows between buffers, straight from pinned host memory where the target is on a GPU.

A host that gathers first and copies then is five times slower than the whole zero-copy gather, and would need
the indices on the host, so the device would have to wait.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def copy_rows(source: Tensor, rows: Tensor, target: Tensor, slots: Tensor, wanted: Tensor | None) -> None:
    """target[slots[i]] = source[rows[i]] for each i that is wanted. No host synchronisation.

    Args:
        source: [N, D], on the target's device or in pinned host memory.
        rows: [R] int64 on the target's device.
        target: [M, D].
        slots: [R] int64, all different.
        wanted: [R] bool, None for all.
    """
    if source.device == target.device:
        fresh = source.index_select(0, rows)
        if wanted is not None:
            fresh = torch.where(wanted.unsqueeze(1), fresh, target.index_select(0, slots))
        target.index_copy_(0, slots, fresh)
        return
    count, dim = rows.numel(), source.shape[1]
    if count:
        everything = rows if wanted is None else wanted
        _kernel()[(count,)](source, rows, target, slots, everything, dim, wanted is None, _power_of_two(dim))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@cache
def _kernel() -> Any:
    """The Triton kernel, one program a row; compiled at its first use, so a CPU never needs Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(source, rows, target, slots, wanted, dim, every: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.program_id(0)
        column = tl.arange(0, width)
        inside = column < dim
        if not every:
            inside = inside & (tl.load(wanted + i) != 0)
        row = tl.load(source + tl.load(rows + i) * dim + column, mask=inside)
        tl.store(target + tl.load(slots + i) * dim + column, row, mask=inside)

    return kernel
