"""Copy listed units of rows from buffers in pinned host memory, or on the device, into slots of a store.

Shapes: S segments, X lists (S/X neighbouring segments share one), M places of a list, D numbers of a row, N
rows that a program copies at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16
"""N. Sixty-four programs then keep several times the rows in flight that PCIe needs."""

HOST_PROGRAMS, DEVICE_PROGRAMS = 64, 512
"""About how many programs all segments have. For host memory few are enough, and leave room for others."""


def fetch(
    pairs: Sequence[tuple[Tensor, Tensor]],
    source_first_S: Tensor,
    target_first_S: Tensor,
    units_XM: Tensor,
    places_XM: Tensor,
    counts_X: Tensor,
    size: int,
) -> None:
    """Copy, for each listed place p and in all segments of the list, `size` rows: those from row
    size * units_XM[x, p] on, of the source segment, to those from row size * p on, of the target segment.

    No host synchronisation. What is not listed costs nothing.

    Args:
        pairs: one or two (source [*, D], target [*, D]) of one dtype, contiguous; a source is on the target's
            device or in pinned host memory.
        source_first_S, target_first_S: [S] int64, first rows of the segments.
        units_XM: [X, M] int32, contiguous.
        places_XM: [X, M] int32, contiguous; the first `counts_X[x]` are listed.
        counts_X: [X] int32.
    """
    assert len(pairs) in (1, 2)
    assert all(a.dtype == b.dtype and a.shape[1] == b.shape[1] for a, b in pairs)
    assert all(x.is_contiguous() for x in (*pairs[0], *pairs[-1], units_XM, places_XM))
    (source, target), (more, there) = pairs[0], pairs[-1]
    segments, (lists, width) = target_first_S.shape[0], units_XM.shape
    programs = HOST_PROGRAMS if source.device != target.device else DEVICE_PROGRAMS
    each = max(1, min(programs // segments, triton.cdiv(width * size, BLOCK)))
    dim = source.shape[1]
    _fetch[(each, segments)](
        source, target, more, there, source_first_S, target_first_S, units_XM, places_XM, counts_X, width,
        size, segments // lists, dim, triton.next_power_of_2(dim), len(pairs) == 2, BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def _fetch(  # type: ignore[no-untyped-def]
    source, target, more, there, source_first, target_first, units, places, counts, width,
    size: tl.constexpr, share: tl.constexpr, dim: tl.constexpr, dim_pad: tl.constexpr, two: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Program p of a segment copies blocks p, p + P, p + 2P, ... of its list."""
    s = tl.program_id(1)
    x = (s // share).to(tl.int64)
    total = tl.load(counts + x) * size
    source_row = tl.load(source_first + s)
    target_row = tl.load(target_first + s)
    d = tl.arange(0, dim_pad)
    for start in range(tl.program_id(0) * block, total, tl.num_programs(0) * block):
        i = start + tl.arange(0, block)
        live = i < total
        place = tl.load(places + x * width + i // size, mask=live, other=0)
        unit = tl.load(units + x * width + place, mask=live, other=0)
        row = source_row + unit.to(tl.int64) * size + i % size
        slot = target_row + place.to(tl.int64) * size + i % size
        mask = live[:, None] & (d < dim)[None, :]
        tile = tl.load(source + row[:, None] * dim + d[None, :], mask=mask)
        if two:
            # Both are on their way before either is written.
            other = tl.load(more + row[:, None] * dim + d[None, :], mask=mask)
            tl.store(there + slot[:, None] * dim + d[None, :], other, mask=mask)
        tl.store(target + slot[:, None] * dim + d[None, :], tile, mask=mask)
