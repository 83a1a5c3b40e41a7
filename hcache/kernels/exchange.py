"""Exchange what a buffer's slots hold for what is wanted, and list the slots that changed, in one launch.

Shapes: X rows, M slots of a row, N slots that a program handles at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""N, at most."""


def exchange(
    held_XM: Tensor, wanted_XM: Tensor, most: int, moved_X: Tensor, valid_X: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See hcache.cache.exchange.exchange. No host synchronisation.

    Args:
        held_XM: [X, M] int32, contiguous, changed in place; numbers below `most`, or `most` for none.
        wanted_XM: likewise, read.
        moved_X: [X] int64, grows by the numbers that came.
        valid_X: [X] bool, rows that change; None for all.

    Returns:
        Slots that changed [X, M] int32, ascending, then zeros; and how many each row has [X] int32.
    """
    rows, width = held_XM.shape
    assert held_XM.dtype == wanted_XM.dtype == torch.int32
    assert all(x.is_contiguous() for x in (held_XM, wanted_XM))
    marks = torch.zeros(rows, most, dtype=torch.uint8, device=held_XM.device)
    places, newcomers = torch.zeros_like(held_XM), torch.empty_like(held_XM)
    counts = torch.empty(rows, dtype=torch.int32, device=held_XM.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    if rows:
        _exchange[(rows,)](
            held_XM, wanted_XM, marks, newcomers, places, counts, moved_X,
            moved_X if valid_X is None else valid_X.contiguous(), width, most, valid_X is None, block,
            num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return places, counts


@triton.jit
def _exchange(  # type: ignore[no-untyped-def]
    held, wanted, marks, newcomers, places, counts, moved, valid, width, most,
    every: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program a row; marks: 1 wanted, 2 wanted and held. Barriers part what threads write and read."""
    x = tl.program_id(0).to(tl.int64)
    held, wanted, newcomers, places = (
        held + x * width,
        wanted + x * width,
        newcomers + x * width,
        places + x * width,
    )
    marks = marks + x * most
    n = tl.arange(0, block)
    alive = n >= 0
    if not every:
        alive = alive & (tl.load(valid + x) != 0)
    for start in range(0, width, block):
        inside = start + n < width
        number = tl.load(wanted + start + n, mask=inside, other=most)
        tl.store(marks + number, tl.full([block], 1, tl.uint8), mask=number < most)
    tl.debug_barrier()
    left = tl.full([], 0, tl.int32)
    for start in range(0, width, block):
        inside = start + n < width
        number = tl.load(held + start + n, mask=inside, other=most)
        stays = tl.load(marks + number, mask=number < most, other=1) != 0
        tl.store(marks + number, tl.full([block], 2, tl.uint8), mask=stays & (number < most))
        leaving = (~stays & alive).to(tl.int32)
        tl.store(places + left + tl.cumsum(leaving, 0) - leaving, start + n, mask=leaving != 0)
        left += tl.sum(leaving, 0)
    tl.debug_barrier()
    came = tl.full([], 0, tl.int32)
    for start in range(0, width, block):
        inside = start + n < width
        number = tl.load(wanted + start + n, mask=inside, other=most)
        coming = (tl.load(marks + number, mask=number < most, other=2) == 1).to(tl.int32)
        tl.store(newcomers + came + tl.cumsum(coming, 0) - coming, number, mask=coming != 0)
        came += tl.sum(coming, 0)
    tl.debug_barrier()
    for start in range(0, left, block):
        inside = start + n < left
        place = tl.load(places + start + n, mask=inside, other=0)
        tl.store(held + place, tl.load(newcomers + start + n, mask=inside, other=0), mask=inside)
    tl.store(counts + x, left)
    tl.store(moved + x, tl.load(moved + x) + left)
