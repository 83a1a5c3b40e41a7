"""One step of a cache of constant size: a token into the slot that is free, and another one out.

Two launches find and take out the worst token of each segment: the first scores tiles of places and leaves of
each its worst one, the second picks among these and moves up what is behind it. What a tile's program needs
of the next tile was left by the first launch too, so all can move in place.

Shapes: S segments (one a sequence and KV head), W places in text order, G query heads of a segment, D head
dim, N places of a tile. Keys and values are flat [slots, D], logits [slots, G].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave

TILE = 512
"""N. 45 tiles for 23,000 places: with 8 segments, almost three programs for each SM."""


class Judging(NamedTuple):
    """How the attention that a token receives becomes its score.

    Args:
        largest: the largest weight of the query heads counts; otherwise their sum.
        divisor: of the sum: G for their mean.
        kernel: places, an odd number, over which scores are pooled before the protected ones; text has
            zeros around it.
        highest: pooling takes the highest; otherwise the mean.
    """

    largest: bool = False
    divisor: int = 1
    kernel: int = 1
    highest: bool = False


def put(
    k_SD: Tensor, v_SD: Tensor, keys: Tensor, values: Tensor, first_S: Tensor, lengths_S: Tensor,
    order_SW: Tensor, capacity_S: Tensor, real_S: Tensor | None = None,
) -> None:  # fmt: skip
    """Write one token per segment into the slot at the place behind its last one.

    No host synchronisation; the caller has made room.

    Args:
        k_SD, v_SD: [S, D]; numbers of a row are adjacent, rows may be strided.
        keys, values: [slots, D] of the same dtype, contiguous.
        first_S: [S] int64, first slot of each segment.
        lengths_S: [S] int32, slots that have been used; afterwards the one that was written is among them.
        order_SW: [S, W] int32, slots in text order.
        capacity_S: [S] int32, tokens that a segment may hold, besides the new one.
        real_S: [S] bool, segments that have a token; None for all.
    """
    segments, dim = _checked(k_SD, v_SD, keys, values)
    _put[(segments,)](
        k_SD, v_SD, keys, values, first_S, lengths_S, order_SW, capacity_S, _or(real_S, lengths_S),
        k_SD.stride(0), v_SD.stride(0), order_SW.shape[1], real_S is not None,
        dim, triton.next_power_of_2(dim), num_warps=1, **chained(keys.device),
    )  # fmt: skip


def put_oldest(
    k_SD: Tensor, v_SD: Tensor, keys: Tensor, values: Tensor, first_S: Tensor, lengths_S: Tensor,
    next_S: Tensor, gone_S: Tensor, capacity_S: Tensor, sinks_S: Tensor, real_S: Tensor | None = None,
) -> None:  # fmt: skip
    """`put` for segments that always lose their oldest token behind the sinks: their slots are a ring.

    Args:
        next_S: [S] int32, slot of the next token: up to the capacity, then round from `sinks_S` on.
        gone_S: [S] int32, tokens that have left.
        sinks_S: [S] int32, first slots that no token leaves.
    """
    segments, dim = _checked(k_SD, v_SD, keys, values)
    _put_oldest[(segments,)](
        k_SD, v_SD, keys, values, first_S, lengths_S, next_S, gone_S, capacity_S, sinks_S,
        _or(real_S, lengths_S), k_SD.stride(0), v_SD.stride(0), real_S is not None,
        dim, triton.next_power_of_2(dim), num_warps=1, **chained(keys.device),
    )  # fmt: skip


def evict(
    logits: Tensor, totals_SG: Tensor, first_S: Tensor, lengths_S: Tensor, order_SW: Tensor,
    capacity_S: Tensor, protected_S: Tensor, prompt_S: Tensor, judging: Judging,
    sums_SW: Tensor | None = None, real_S: Tensor | None = None,
) -> None:  # fmt: skip
    """Score the tokens of each segment after a `put`, and take the worst out of those that are over-full.

    The worst has the lowest score before the protected ones, the earliest of equals; where all are protected
    it is the first. Its slot goes behind the newest token. No host synchronisation.

    Args:
        logits: [slots, G] float32, contiguous; not read beyond a segment's tokens.
        totals_SG: [S, G] float32, log-sum-exp of the logits.
        first_S, lengths_S, order_SW, capacity_S, real_S: see `put`; the order changes.
        protected_S: [S] int32, last tokens that stay, the newest included.
        prompt_S: [S] int32, tokens of the prompt that are left; they are the first.
        sums_SW: [S, W] float32, contiguous, what tokens have received before, 0 from the newest on; with it
            the score is the sum, and the sums follow. Not together with pooling.
    """
    segments, width = order_SW.shape
    heads = totals_SG.shape[1]
    assert all(x.is_contiguous() for x in (logits, totals_SG, order_SW))
    assert sums_SW is None or (sums_SW.is_contiguous() and judging.kernel == 1)
    tiles = triton.cdiv(width, TILE)
    # Of each tile: where its worst token is, in which slot, and the slot at the tile's first place.
    ints = torch.empty(3, segments, tiles, dtype=torch.int32, device=order_SW.device)
    # Of each tile: its lowest score, and the sum at its first place.
    floats = torch.empty(2, segments, tiles, dtype=torch.float32, device=order_SW.device)
    sums, real = _or(sums_SW, floats), _or(real_S, lengths_S)
    both = (lengths_S, real, order_SW, sums, *ints.unbind(0), *floats.unbind(0))
    summed, masked = sums_SW is not None, real_S is not None
    grid = (tiles, segments)
    _judge[grid](
        *both, logits, totals_SG, first_S, protected_S, width,
        judging.largest, judging.divisor, judging.kernel, judging.highest,
        summed, masked, heads, triton.next_power_of_2(heads), TILE,
        num_warps=4, **chained(order_SW.device),
    )  # fmt: skip
    _take_out[grid](
        *both, capacity_S, prompt_S, width, summed, masked, triton.next_power_of_2(tiles), TILE,
        num_warps=4, **chained(order_SW.device),
    )  # fmt: skip


def _checked(k_SD: Tensor, v_SD: Tensor, keys: Tensor, values: Tensor) -> tuple[int, int]:
    assert k_SD.stride(1) == v_SD.stride(1) == 1
    assert all(x.is_contiguous() and x.dtype == k_SD.dtype for x in (keys, values))
    return k_SD.shape[0], k_SD.shape[1]


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """An argument that a kernel does not look at still has to be a tensor."""
    return other if x is None else x


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    k, v, keys, values, slot, k_row, v_row, dim: tl.constexpr, dim_pad: tl.constexpr
):
    d = tl.arange(0, dim_pad)
    inside = d < dim
    place = slot.to(tl.int64) * dim + d
    tl.store(keys + place, tl.load(k + k_row + d, mask=inside), mask=inside)
    tl.store(values + place, tl.load(v + v_row + d, mask=inside), mask=inside)


@triton.jit
def _put(  # type: ignore[no-untyped-def]
    k, v, keys, values, first, lengths, order, capacity, real, k_stride, v_stride, width,
    masked: tl.constexpr, dim: tl.constexpr, dim_pad: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """One program a segment, of one warp: all its threads have read the length before one writes it."""
    enter(chain)
    leave(chain)
    s = tl.program_id(0).to(tl.int64)
    fed = True
    if masked:
        fed = tl.load(real + s) != 0
    if fed:
        length = tl.load(lengths + s)
        slot = tl.load(order + s * width + tl.minimum(length, tl.load(capacity + s)))
        base = tl.load(first + s)
        _write(k, v, keys, values, base + slot, s * k_stride, s * v_stride, dim, dim_pad)
        tl.debug_barrier()
        tl.store(lengths + s, tl.maximum(length, slot + 1))


@triton.jit
def _put_oldest(  # type: ignore[no-untyped-def]
    k, v, keys, values, first, lengths, following, gone, capacity, sinks, real, k_stride, v_stride,
    masked: tl.constexpr, dim: tl.constexpr, dim_pad: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """As `_put`; what one thread writes all others have read."""
    enter(chain)
    leave(chain)
    s = tl.program_id(0).to(tl.int64)
    fed = True
    if masked:
        fed = tl.load(real + s) != 0
    if fed:
        length = tl.load(lengths + s)
        slot = tl.load(following + s)
        most = tl.load(capacity + s)
        left = tl.load(gone + s)
        base = tl.load(first + s)
        _write(k, v, keys, values, base + slot, s * k_stride, s * v_stride, dim, dim_pad)
        after = tl.where(slot == most, tl.load(sinks + s), slot + 1)
        tl.debug_barrier()
        tl.store(lengths + s, tl.maximum(length, slot + 1))
        tl.store(following + s, after)
        tl.store(gone + s, left + (length >= most).to(tl.int32))


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    logits, totals, slot, live,
    largest: tl.constexpr, divisor: tl.constexpr, heads: tl.constexpr, heads_pad: tl.constexpr,
):  # fmt: skip
    """What the tokens in these slots receive from the query heads together; 0 where they are not live."""
    g = tl.arange(0, heads_pad)
    inside = live[:, None] & (g < heads)[None, :]
    place = slot[:, None] * heads + g[None, :]
    logit_NG = tl.load(logits + place, mask=inside, other=0.0)
    total_G = tl.load(totals + g, mask=g < heads, other=0.0)
    weight_NG = tl.where(inside, tl.exp(logit_NG - total_G[None, :]), 0.0)
    return tl.max(weight_NG, 1) if largest else tl.sum(weight_NG, 1) / divisor


@triton.jit
def _judge(  # type: ignore[no-untyped-def]
    lengths, real, order, sums, worst, worst_slot, first_slot, lowest, first_sum,
    logits, totals, first, protected, width,
    largest: tl.constexpr, divisor: tl.constexpr, kernel: tl.constexpr, highest: tl.constexpr,
    summed: tl.constexpr, masked: tl.constexpr, heads: tl.constexpr, heads_pad: tl.constexpr,
    tile: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """One program a tile: scores of its places, and of these the lowest; sums take in what is new."""
    enter(chain)
    leave(chain)
    t = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    place = t * tile + tl.arange(0, tile)
    row = order + s * width
    newest = tl.load(lengths + s) - 1
    before = newest + 1 - tl.load(protected + s)
    base = tl.load(first + s)
    totals += s * heads
    slot = tl.load(row + place, mask=place < width, other=0)
    fed = True
    if masked:
        fed = tl.load(real + s) != 0
    if summed:
        live = (place <= newest) & fed
        added = _weights(logits, totals, base + slot, live, largest, divisor, heads, heads_pad)
        score = tl.load(sums + s * width + place, mask=live, other=0.0) + added
        tl.store(sums + s * width + place, score, mask=live)
        tl.store(first_sum + s * tl.num_programs(0) + t, tl.sum(tl.where(place == t * tile, score, 0.0), 0))
    else:
        score = tl.zeros([tile], tl.float32)
        for i in tl.static_range(kernel):
            near = place + (i - kernel // 2)
            live = (near >= 0) & (near < before) & fed
            beside = tl.load(row + near, mask=live, other=0)
            weight = _weights(logits, totals, base + beside, live, largest, divisor, heads, heads_pad)
            score = tl.maximum(score, weight) if highest else score + weight
        if not highest:
            score = score / kernel
    score = tl.where(place < tl.maximum(before, 1), score, float("inf"))
    low = tl.min(score, 0)
    at = tl.min(tl.where(score == low, place, width), 0)
    mine = s * tl.num_programs(0) + t
    tl.store(lowest + mine, low)
    tl.store(worst + mine, at)
    tl.store(worst_slot + mine, tl.sum(tl.where(place == at, slot, 0), 0))
    tl.store(first_slot + mine, tl.sum(tl.where(place == t * tile, slot, 0), 0))


@triton.jit
def _take_out(  # type: ignore[no-untyped-def]
    lengths, real, order, sums, worst, worst_slot, first_slot, lowest, first_sum, capacity, prompt, width,
    summed: tl.constexpr, masked: tl.constexpr, tiles_pad: tl.constexpr, tile: tl.constexpr,
    chain: tl.constexpr,
):  # fmt: skip
    """One program a tile. All its threads have read before one writes; of other tiles it reads nothing."""
    enter(chain)
    leave(chain)
    t = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    most = tl.load(capacity + s)
    over = tl.load(lengths + s) > most
    if masked:
        over = over & (tl.load(real + s) != 0)
    if over:
        tiles = tl.num_programs(0)
        i = tl.arange(0, tiles_pad)
        low_T = tl.load(lowest + s * tiles + i, mask=i < tiles, other=float("inf"))
        at_T = tl.load(worst + s * tiles + i, mask=i < tiles, other=width)
        victim = tl.min(tl.where(low_T == tl.min(low_T, 0), at_T, width), 0)
        slot_T = tl.load(worst_slot + s * tiles + i, mask=i < tiles, other=0)
        freed = tl.sum(tl.where(at_T == victim, slot_T, 0), 0)
        end = (t + 1) * tile
        place = t * tile + tl.arange(0, tile)
        row = s * width + place
        moves = (place >= victim) & (place <= most)
        # The newest token is at place `most`: its new neighbour is the slot that is free.
        within = moves & (place < most) & (place + 1 < end)
        moved = tl.load(order + row + 1, mask=within, other=0)
        following = s * tiles + tl.minimum(t + 1, tiles - 1)
        moved = tl.where(place + 1 == end, tl.load(first_slot + following), moved)
        moved = tl.where(place == most, freed, moved)
        if summed:
            sum_N = tl.load(sums + row + 1, mask=within, other=0.0)
            sum_N = tl.where(place + 1 == end, tl.load(first_sum + following), sum_N)
            sum_N = tl.where(place == most, 0.0, sum_N)
        tl.debug_barrier()
        tl.store(order + row, moved, mask=moves)
        if summed:
            tl.store(sums + row, sum_N, mask=moves)
        if t == 0:
            left = tl.load(prompt + s)
            tl.debug_barrier()
            tl.store(prompt + s, left - (victim < left).to(tl.int32))
