"""What Quest does in a step beside attending: a token into its page's bounds, and the worth of all pages.

Shapes: S segments (one a sequence and KV head), G query heads of a segment, D head dim, P pages there is room
for, R rows that choose pages (S or S*G), N pages of a tile, T tiles. Keys and values are flat [slots, D].
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave

TILE = 512
"""N. 28 tiles for the pages of 224K tokens: with 8 segments, more than one program for each SM."""


class Worth(IntEnum):
    """How the scores of a segment's query heads become the worth of a page."""

    softmax = 0
    mean = 1
    max = 2
    each = 3


class Chooser(NamedTuple):
    """What a step's choice of pages starts from.

    Args:
        rows_SG2D: relu of q and of -q, in the dtype of the keys: their product with a page's bounds is an
            upper bound of its logits.
        earlier_S: int32, pages before the current one.
        pages_R: int32, pages to choose, the current one included.
    """

    rows_SG2D: Tensor
    earlier_S: Tensor
    pages_R: Tensor


def take_in(
    q_SGD: Tensor, k_SD: Tensor, v_SD: Tensor, keys: Tensor, values: Tensor, first_S: Tensor,
    lengths_S: Tensor, bounds_SP2D: Tensor, allowed_R: Tensor, limits_R: Tensor, page: int,
) -> Chooser:  # fmt: skip
    """Append one token to every segment and to the bounds of its page, in one launch.

    No host synchronisation; the caller has made room.

    Args:
        q_SGD: contiguous.
        k_SD, v_SD: numbers of a row are adjacent, rows may be strided.
        keys, values: [slots, D] of the same dtype as q, k and v, contiguous.
        first_S: [S] int64, first slot of each segment.
        lengths_S: [S] int32, tokens of each segment; one more afterwards.
        bounds_SP2D: contiguous, maxima of k and of -k over the tokens of a page; -inf where there are none.
        allowed_R: [R] int64, pages that a row may attend to.
        limits_R: [R] int64; afterwards the tokens in a row's pages.
        page: tokens of a page.
    """
    segments, group, dim = q_SGD.shape
    assert k_SD.stride(1) == v_SD.stride(1) == 1
    assert all(x.is_contiguous() for x in (q_SGD, keys, values, bounds_SP2D, allowed_R, limits_R))
    assert q_SGD.dtype == k_SD.dtype == v_SD.dtype == keys.dtype == bounds_SP2D.dtype
    rows_SG2D = q_SGD.new_empty(segments, group, 2 * dim)
    earlier_S, pages_R = torch.empty_like(lengths_S), lengths_S.new_empty(allowed_R.shape)
    _take_in[(segments,)](
        q_SGD, k_SD, v_SD, keys, values, first_S, lengths_S, bounds_SP2D, allowed_R, limits_R,
        rows_SG2D, earlier_S, pages_R, k_SD.stride(0), v_SD.stride(0), bounds_SP2D.shape[1],
        page, group, triton.next_power_of_2(group), allowed_R.numel() // segments,
        triton.next_power_of_2(allowed_R.numel() // segments), dim, triton.next_power_of_2(dim),
        num_warps=1, **chained(keys.device),
    )  # fmt: skip
    return Chooser(rows_SG2D, earlier_S, pages_R)


def worth_of(scores_SGP: Tensor, earlier_S: Tensor, worth: Worth) -> Tensor:
    """What each page is worth to each row [R, P] float32: +inf for the current one, -inf for those behind.

    No host synchronisation.

    Args:
        scores_SGP: float32, contiguous; logits where `worth` is softmax.
        earlier_S: [S] int32, pages before the current one.
    """
    segments, group, room = scores_SGP.shape
    assert scores_SGP.is_contiguous()
    tiles, heads = triton.cdiv(room, TILE), triton.next_power_of_2(group)
    rows = segments * group if worth is Worth.each else segments
    worth_RP = scores_SGP.new_empty(rows, room)
    parts = scores_SGP.new_empty(2, segments, group, tiles)
    if worth is Worth.softmax:
        _totals[(tiles, segments)](
            scores_SGP, earlier_S, parts[0], parts[1], room, group, heads, TILE,
            num_warps=4, **chained(scores_SGP.device),
        )  # fmt: skip
    _worth[(tiles, segments)](
        scores_SGP, earlier_S, parts[0], parts[1], worth_RP, room,
        int(worth), group, heads, triton.next_power_of_2(tiles), TILE,
        num_warps=4, **chained(scores_SGP.device),
    )  # fmt: skip
    return worth_RP


@triton.jit
def _take_in(  # type: ignore[no-untyped-def]
    q, k, v, keys, values, first, lengths, bounds, allowed, limits, rows, earlier, pages,
    k_stride, v_stride, room, page: tl.constexpr, group: tl.constexpr, group_pad: tl.constexpr,
    choosers: tl.constexpr, choosers_pad: tl.constexpr, dim: tl.constexpr, dim_pad: tl.constexpr,
    chain: tl.constexpr,
):  # fmt: skip
    """One program a segment, of one warp: all its threads have read the length before one writes it."""
    enter(chain)
    leave(chain)
    s = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, dim_pad)
    inside = d < dim
    length = tl.load(lengths + s)
    last = length // page
    kind = keys.dtype.element_ty
    k_D = tl.load(k + s * k_stride + d, mask=inside)
    slot = (tl.load(first + s) + length) * dim + d
    tl.store(keys + slot, k_D, mask=inside)
    tl.store(values + slot, tl.load(v + s * v_stride + d, mask=inside), mask=inside)
    bound = bounds + (s * room + last) * 2 * dim + d
    k_D = k_D.to(tl.float32)
    high_D = tl.maximum(tl.load(bound, mask=inside).to(tl.float32), k_D)
    low_D = tl.maximum(tl.load(bound + dim, mask=inside).to(tl.float32), -k_D)
    tl.store(bound, high_D.to(kind), mask=inside)
    tl.store(bound + dim, low_D.to(kind), mask=inside)
    g = tl.arange(0, group_pad)
    whole = (g < group)[:, None] & inside[None, :]
    row = s * group + g[:, None]
    q_GD = tl.load(q + row * dim + d[None, :], mask=whole).to(tl.float32)
    half = rows + row * 2 * dim + d[None, :]
    tl.store(half, tl.maximum(q_GD, 0.0).to(kind), mask=whole)
    tl.store(half + dim, tl.maximum(-q_GD, 0.0).to(kind), mask=whole)
    r = tl.arange(0, choosers_pad)
    mine = s * choosers + r
    most = tl.load(allowed + mine, mask=r < choosers, other=1).to(tl.int32)
    chosen = tl.minimum(most - 1, last)
    tl.store(pages + mine, chosen + 1, mask=r < choosers)
    tl.store(limits + mine, (length + 1 - (last - chosen) * page).to(tl.int64), mask=r < choosers)
    tl.debug_barrier()
    tl.store(earlier + s, last)
    tl.store(lengths + s, length + 1)


@triton.jit
def _totals(  # type: ignore[no-untyped-def]
    scores, earlier, peaks, totals, room,
    group: tl.constexpr, group_pad: tl.constexpr, tile: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """One program a tile: the highest logit of its earlier pages, and the sum of exponentials to it."""
    enter(chain)
    leave(chain)
    t = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, group_pad)
    p = t * tile + tl.arange(0, tile)
    live = (g < group)[:, None] & (p < tl.load(earlier + s))[None, :]
    place = (s * group + g[:, None]) * room + p[None, :]
    score_GN = tl.load(scores + place, mask=live, other=float("-inf"))
    peak_G = tl.max(score_GN, 1)
    # A tile without an earlier page has peak -inf; 0 instead keeps exp(-inf - 0) = 0 rather than NaN.
    around_G = tl.where(peak_G == float("-inf"), 0.0, peak_G)
    total_G = tl.sum(tl.exp(score_GN - around_G[:, None]), 1)
    part = (s * group + g) * tl.num_programs(0) + t
    tl.store(peaks + part, peak_G, mask=g < group)
    tl.store(totals + part, total_G, mask=g < group)


@triton.jit
def _worth(  # type: ignore[no-untyped-def]
    scores, earlier, peaks, totals, worth, room,
    kind: tl.constexpr, group: tl.constexpr, group_pad: tl.constexpr, tiles_pad: tl.constexpr,
    tile: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """One program a tile. `kind`: see Worth."""
    enter(chain)
    leave(chain)
    t = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    last = tl.load(earlier + s)
    g = tl.arange(0, group_pad)
    p = t * tile + tl.arange(0, tile)
    known = (g < group)[:, None] & (p < last)[None, :]
    place = (s * group + g[:, None]) * room + p[None, :]
    rest = 0.0 if kind == 1 else float("-inf")
    score_GN = tl.load(scores + place, mask=known, other=rest)
    if kind == 0:
        tiles = tl.num_programs(0)
        i = tl.arange(0, tiles_pad)
        part = (s * group + g[:, None]) * tiles + i[None, :]
        whole = (g < group)[:, None] & (i < tiles)[None, :]
        peak_GT = tl.load(peaks + part, mask=whole, other=float("-inf"))
        total_GT = tl.load(totals + part, mask=whole, other=0.0)
        peak_G = tl.max(peak_GT, 1)
        around_G = tl.where(peak_G == float("-inf"), 0.0, peak_G)
        total_G = tl.sum(total_GT * tl.exp(peak_GT - around_G[:, None]), 1)
        # Without an earlier page nothing is read of what this gives.
        total_G = around_G + tl.log(tl.where(total_G > 0.0, total_G, 1.0))
        score_GN = score_GN - total_G[:, None]
    current = tl.where(p == last, float("inf"), float("-inf"))
    if kind == 3:
        worth_GN = tl.where((p < last)[None, :], score_GN, current[None, :])
        tl.store(worth + place, worth_GN, mask=(g < group)[:, None] & (p < room)[None, :])
    else:
        score_N = tl.sum(score_GN, 0) / group if kind == 1 else tl.max(score_GN, 0)
        tl.store(worth + s * room + p, tl.where(p < last, score_N, current), mask=p < room)
