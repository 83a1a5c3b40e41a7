"""Copy single rows between buffers, from pinned host memory too, with a bounded number of programs.

Shapes: I rows to copy, D numbers of a row, N rows that a program copies at once; Q lists, K places of one.
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


def copy_lists(
    pairs: Sequence[tuple[Tensor, Tensor]],
    counts_Q: Tensor,
    listed_QK: Tensor,
    *,
    look_up: bool = True,
    source_first_Q: Tensor | None = None,
    target_first_Q: Tensor | None = None,
    programs: int = 64,
    count: Tensor | None = None,
) -> None:
    """Copy the rows of Q lists in one launch; what they are, see hcache.cache.gather.

    No host synchronisation. All programs share all lists' rows, whichever lists have any; where none has,
    they end at once.
    """
    assert len(pairs) in (1, 2)
    assert all(a.dtype == b.dtype and a.shape[1] == b.shape[1] for a, b in pairs)
    assert all(x.is_contiguous() for x in (*pairs[0], *pairs[-1], counts_Q, listed_QK))
    lists, room = listed_QK.shape
    if not listed_QK.numel():
        return
    (source, target), (more, there) = pairs[0], pairs[-1]
    dim, more_dim = source.shape[1], more.shape[1]
    _copy_lists[(min(programs, triton.cdiv(lists * room, BLOCK)),)](
        source, target, more, there, counts_Q, listed_QK,
        counts_Q if source_first_Q is None else source_first_Q,
        counts_Q if target_first_Q is None else target_first_Q,
        counts_Q if count is None else count, lists, room,
        triton.next_power_of_2(lists), dim, triton.next_power_of_2(dim),
        more_dim if len(pairs) == 2 else 0, triton.next_power_of_2(more_dim),
        look_up, source_first_Q is not None, target_first_Q is not None, count is not None, BLOCK,
        num_warps=4,
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
        _copy_block(source, target, more, there, row, slot, live, dim, dim_pad, more_dim, more_pad)
        copied += tl.sum(live.to(tl.int64), 0)
    if counted:
        tl.atomic_add(count, copied)


@triton.jit
def _copy_lists(  # type: ignore[no-untyped-def]
    source, target, more, there, counts, listed, source_first, target_first, count, lists, room,
    lists_pad: tl.constexpr, dim: tl.constexpr, dim_pad: tl.constexpr, more_dim: tl.constexpr,
    more_pad: tl.constexpr, look_up: tl.constexpr, sourced: tl.constexpr, targeted: tl.constexpr,
    counted: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program p copies blocks p, p + P, p + 2P, ... of all lists' rows, one list behind the other."""
    q = tl.arange(0, lists_pad)
    each = tl.load(counts + q, mask=q < lists, other=0).to(tl.int32)
    ends = tl.cumsum(each, 0)
    total = tl.sum(each, 0)
    if counted:
        tl.atomic_add(count, total.to(tl.int64), mask=(tl.program_id(0) == 0) & (total > 0))
    for start in range(tl.program_id(0) * block, total, tl.num_programs(0) * block):
        i = start + tl.arange(0, block)
        live = i < total
        behind = ends[None, :] <= i[:, None]
        of = tl.minimum(tl.sum(behind.to(tl.int32), 1), lists - 1)
        place = tl.where(live, i - tl.sum(tl.where(behind, each[None, :], 0), 1), 0).to(tl.int64)
        at = of.to(tl.int64) * room
        row = at if not sourced else tl.load(source_first + of)
        row += tl.load(listed + at + place, mask=live, other=0) if look_up else place
        slot = place + (at if not targeted else tl.load(target_first + of))
        _copy_block(source, target, more, there, row, slot, live, dim, dim_pad, more_dim, more_pad)


@triton.jit
def _copy_block(  # type: ignore[no-untyped-def]
    source, target, more, there, row, slot, live,
    dim: tl.constexpr, dim_pad: tl.constexpr, more_dim: tl.constexpr, more_pad: tl.constexpr,
):  # fmt: skip
    """Rows of one pair of buffers, or of two (more_dim > 0)."""
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
