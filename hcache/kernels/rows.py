"""Copy single rows between buffers, from pinned host memory too, with a bounded number of programs.

Shapes: I rows to copy, D numbers of a row, N rows that a program copies at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
"""N. With 64 programs, 512 KiB of 256-byte rows are in flight: several times what PCIe needs."""


def copy_rows(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rows: Tensor,
    slots: Tensor,
    wanted: Tensor | None = None,
    programs: int = 64,
    count: Tensor | None = None,
) -> None:
    """target[slots[i]] = source[rows[i]] for each i that is wanted and each pair, in one launch.

    No host synchronisation. Few programs leave most of the device to other kernels.

    Args:
        pairs: one or two (source [*, D], target [*, D]) of one dtype, contiguous; a source is on the
            target's device or in pinned host memory.
        rows: [I] int64 on the target's device.
        slots: [I] int64 on the target's device, all different.
        wanted: [I] bool, None for all.
        programs: programs of the launch, at most.
        count: one int64 number on the device; grows by the rows that were wanted.
    """
    assert len(pairs) in (1, 2)
    assert all(a.dtype == b.dtype and a.shape[1] == b.shape[1] for a, b in pairs)
    assert all(x.is_contiguous() for pair in pairs for x in pair)
    total = rows.numel()
    if not total:
        return
    (source, target), (more, there) = pairs[0], pairs[-1]
    dim, more_dim = source.shape[1], more.shape[1]
    _copy[(min(programs, triton.cdiv(total, BLOCK)),)](
        source, target, more, there, rows, slots, rows if wanted is None else wanted,
        rows if count is None else count, total, dim, triton.next_power_of_2(dim),
        more_dim if len(pairs) == 2 else 0, triton.next_power_of_2(more_dim),
        wanted is None, count is not None, BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    source, target, more, there, rows, slots, wanted, count, total,
    dim: tl.constexpr, dim_pad: tl.constexpr, more_dim: tl.constexpr, more_pad: tl.constexpr,
    every: tl.constexpr, counted: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program p copies blocks p, p + P, p + 2P, ... of the list."""
    program = tl.program_id(0)
    copied = tl.full([], 0, tl.int64)
    for start in range(program * block, total, tl.num_programs(0) * block):
        i = start + tl.arange(0, block)
        live = i < total
        if not every:
            live = live & (tl.load(wanted + i, mask=live, other=0) != 0)
        row = tl.load(rows + i, mask=live, other=0)
        slot = tl.load(slots + i, mask=live, other=0)
        d = tl.arange(0, dim_pad)
        mask = live[:, None] & (d < dim)[None, :]
        tile = tl.load(source + row[:, None] * dim + d[None, :], mask=mask)
        if more_dim > 0:
            # Asked for before the first tile is stored: one wait for the host, not two.
            e = tl.arange(0, more_pad)
            more_mask = live[:, None] & (e < more_dim)[None, :]
            more_tile = tl.load(more + row[:, None] * more_dim + e[None, :], mask=more_mask)
            tl.store(there + slot[:, None] * more_dim + e[None, :], more_tile, mask=more_mask)
        tl.store(target + slot[:, None] * dim + d[None, :], tile, mask=mask)
        copied += tl.sum(live.to(tl.int64), 0)
    if counted:
        tl.atomic_add(count, copied)
