"""Exact attention of one query token per head over segments of very unequal length.

Work is dealt out by blocks of tokens, not by segments or heads ("stream-K"): the blocks of all segments form
one line, every program takes an equal stretch of it, and a second kernel merges what the programs found. So a
long segment among short ones keeps the whole device busy, and lengths stay on the device.

Shapes: S segments (one a sequence and KV head), R = c*S rows (row r reads segment r // c; mostly c = 1),
G query heads of a row, D head dim, M pages of a row, N tokens of a block, P programs, T blocks of all rows.
Keys and values are flat [slots, D]; tokens of a segment are consecutive slots unless pages say otherwise.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave

MERGED, MERGED_DIM = 128, 32
"""Partial results that a program of the merge loads at once, and numbers of each."""


class Tuning(NamedTuple):
    """How the decode kernel is compiled and launched."""

    block: int
    """N, tokens of a block; a power of two, at least 16."""
    warps: int
    stages: int
    """Depth of the software pipeline: stages - 1 blocks of keys and values are in flight."""
    programs_per_sm: int


TUNINGS = {256: Tuning(64, 4, 4, 2), 512: Tuning(32, 4, 4, 2), 1024: Tuning(16, 4, 3, 2)}
"""By the bytes of a padded key row; below 112 KiB of shared memory a program, so that two fit one SM."""


def tuning_of(dim: int, dtype: torch.dtype) -> Tuning:
    """The tuning for keys of this head dim and dtype; fixed, as measuring at run time would synchronise."""
    row_bytes = triton.next_power_of_2(dim) * dtype.itemsize
    return TUNINGS[max(row_bytes, min(TUNINGS))]


@cache
def _multiprocessors(device: torch.device) -> int:
    """SMs of the device; a few under Triton's interpreter, which runs programs one after the other."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode(
    q_RGD: Tensor,
    keys: Tensor,
    values: Tensor,
    first_S: Tensor,
    limits_R: Tensor,
    *,
    pages: Tensor | None = None,
    page_size: int = 0,
    logits: Tensor | None = None,
    programs: int | None = None,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of scale D**-0.5, accumulated in float32; bit-equal from run to run.

    No host synchronisation; grids and scratch depend on shapes alone, so it can be captured in a graph. What
    lies in slots that no row sees has no effect, NaN included.

    Args:
        q_RGD: [R, G, D] in the dtype of the keys; R is a multiple of S and row r reads segment r // (R / S).
        keys, values: [slots, D], contiguous.
        first_S: [S] int64, first slot of each segment.
        limits_R: [R] int32 or int64, tokens that a row attends to; 0 gives zeros and lse -inf.
        pages: [R, M] int32 or int64. Token t of row r then is at slot
            first + pages[r, t // page_size] * page_size + t % page_size of its segment.
        page_size: tokens of a page, a power of two.
        logits: [slots, R/S * G] float32. The logit q.k * D**-0.5 of head g of row r is stored at each slot
            that the row sees, in column r % (R/S) * G + g; all else is left as it is.
        programs: P, by default `tuning.programs_per_sm` for every SM.
        tuning: by default `tuning_of` the keys.

    Returns:
        Output [R, G, D] in the dtype of q, and log-sum-exp of the logits [R, G] float32.
    """
    rows, group, dim = q_RGD.shape
    assert q_RGD.dtype == keys.dtype == values.dtype
    assert all(x is None or x.is_contiguous() for x in (keys, values, first_S, limits_R, logits))
    assert limits_R.shape == (rows,)
    assert rows % first_S.shape[0] == 0
    assert logits is None or logits.dtype == torch.float32
    assert (pages is None) == (page_size == 0)
    assert pages is None or pages.stride(1) == 1
    tuning = tuning or tuning_of(dim, keys.dtype)
    programs = programs or tuning.programs_per_sm * _multiprocessors(keys.device)
    q_RGD = q_RGD.contiguous()
    out_RGD = torch.empty_like(q_RGD)
    lse_RG = torch.empty(rows, group, dtype=torch.float32, device=keys.device)
    # Pairs (program, row) that meet form a staircase, so program + row names each of them once.
    parts = programs + rows - 1
    sums = torch.empty(parts, group, dim, dtype=torch.float32, device=keys.device)
    peaks, totals = torch.empty(2, parts, group, dtype=torch.float32, device=keys.device).unbind(0)
    rows_pad, dim_pad = max(16, triton.next_power_of_2(rows)), max(16, triton.next_power_of_2(dim))
    share = rows // first_S.shape[0]
    # Reading page numbers ahead of the keys takes half of the stages; this leaves as many keys in flight.
    stages = tuning.stages if pages is None else 2 * tuning.stages - 1
    _attend[(programs,)](
        q_RGD, keys, values, first_S, limits_R,
        limits_R if pages is None else pages, peaks if logits is None else logits,
        sums, peaks, totals, programs, rows, 0 if pages is None else pages.stride(0),
        dim**-0.5, share, group, max(16, triton.next_power_of_2(group)), dim, dim_pad, rows_pad,
        page_size, logits is not None, tuning.block,
        num_warps=tuning.warps, num_stages=stages, **chained(keys.device),
    )  # fmt: skip
    width = min(dim_pad, MERGED_DIM)
    _merge[(rows, group, triton.cdiv(dim, width))](
        sums, peaks, totals, limits_R, out_RGD, lse_RG, programs, rows,
        group, dim, width, rows_pad, tuning.block, MERGED, num_warps=4, **chained(keys.device),
    )  # fmt: skip
    return out_RGD, lse_RG


@triton.jit
def _deal(limits, rows, programs, rows_pad: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """The line of blocks: rows [R'], blocks of each row [R'], where each row ends [R'], blocks a program."""
    row = tl.arange(0, rows_pad)
    limit = tl.load(limits + row, mask=row < rows, other=0).to(tl.int32)
    blocks = (limit + block - 1) // block
    each = (tl.sum(blocks, 0) + programs - 1) // programs
    return row, blocks, tl.cumsum(blocks, 0), tl.maximum(each, 1)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, first, limits, pages, logits, sums, peaks, totals, programs, rows, pages_stride, scale,
    share: tl.constexpr, group: tl.constexpr, group_pad: tl.constexpr, dim: tl.constexpr,
    dim_pad: tl.constexpr, rows_pad: tl.constexpr, page_size: tl.constexpr, store_logits: tl.constexpr,
    block: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """Program p walks over its stretch of the line, and leaves one partial result a row it meets."""
    enter(chain)
    program = tl.program_id(0)
    row, blocks, ends, each = _deal(limits, rows, programs, rows_pad, block)
    at = program * each
    stop = tl.minimum(at + each, tl.sum(blocks, 0))
    g = tl.arange(0, group_pad)
    d = tl.arange(0, dim_pad)
    while at < stop:
        # The first row that ends behind this block; rows without any block are passed over.
        r = tl.sum((ends <= at).to(tl.int32), 0)
        end = tl.sum(tl.where(row == r, ends, 0), 0)
        start = end - tl.sum(tl.where(row == r, blocks, 0), 0)
        upto = tl.minimum(stop, end)
        inside = (g < group)[:, None] & (d < dim)[None, :]
        q_GD = tl.load(q + (r * group + g)[:, None] * dim + d[None, :], mask=inside, other=0.0)
        base = tl.load(first + r // share)
        limit = tl.load(limits + r).to(tl.int32)
        peak_G, total_G, sum_GD = _attend_row(
            q_GD, keys, values, pages + r.to(tl.int64) * pages_stride, logits + (r % share) * group,
            base, limit, at - start, upto - start, scale,
            share, group, dim, group_pad, dim_pad, page_size, store_logits, block,
        )  # fmt: skip
        part = (program + r).to(tl.int64) * group + g
        tl.store(peaks + part, peak_G, mask=g < group)
        tl.store(totals + part, total_G, mask=g < group)
        tl.store(sums + part[:, None] * dim + d[None, :], sum_GD, mask=inside)
        at = upto


@triton.jit
def _attend_row(  # type: ignore[no-untyped-def]
    q_GD, keys, values, pages, logits, base, limit, begin, end, scale,
    share: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, group_pad: tl.constexpr,
    dim_pad: tl.constexpr, page_size: tl.constexpr, store_logits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Online softmax over blocks [begin, end) of one row: peak (of log2), sum of weights, weighted sum."""
    g = tl.arange(0, group_pad)
    d = tl.arange(0, dim_pad)
    n = tl.arange(0, block)
    peak_G = tl.full([group_pad], float("-inf"), tl.float32)
    total_G = tl.zeros([group_pad], tl.float32)
    sum_GD = tl.zeros([group_pad, dim_pad], tl.float32)
    for index in range(begin, end):
        token = index * block + n
        live = token < limit
        if page_size > 0:
            page = tl.load(pages + token // page_size, mask=live, other=0).to(tl.int64)
            slot = base + page * page_size + token % page_size
        else:
            slot = base + token
        # Both tiles are masked: a weight of 0 times a NaN in a slot that nobody wrote would be NaN.
        mask = live[:, None] & (d < dim)[None, :]
        offset = slot[:, None] * dim + d[None, :]
        k_ND = tl.load(keys + offset, mask=mask, other=0.0)
        logit_GN = tl.dot(q_GD, tl.trans(k_ND), input_precision="ieee") * scale
        if store_logits:
            place = logits + slot[None, :] * (share * group) + g[:, None]
            tl.store(place, logit_GN, mask=live[None, :] & (g < group)[:, None])
        logit_GN = tl.where(live[None, :], logit_GN * 1.4426950408889634, float("-inf"))
        higher_G = tl.maximum(peak_G, tl.max(logit_GN, 1))
        weight_GN = tl.exp2(logit_GN - higher_G[:, None])
        fade_G = tl.exp2(peak_G - higher_G)
        total_G = total_G * fade_G + tl.sum(weight_GN, 1)
        v_ND = tl.load(values + offset, mask=mask, other=0.0)
        sum_GD = tl.dot(weight_GN.to(v_ND.dtype), v_ND, sum_GD * fade_G[:, None], input_precision="ieee")
        peak_G = higher_G
    return peak_G, total_G, sum_GD


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    sums, peaks, totals, limits, out, lse, programs, rows,
    group: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, rows_pad: tl.constexpr,
    block: tl.constexpr, merged: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """One program a row, head and part of the head dim: finds the programs that met the row, and merges what
    they left.
    """
    enter(chain)
    leave(chain)
    r = tl.program_id(0)
    g = tl.program_id(1)
    row, blocks, ends, each = _deal(limits, rows, programs, rows_pad, block)
    end = tl.sum(tl.where(row == r, ends, 0), 0)
    begin = end - tl.sum(tl.where(row == r, blocks, 0), 0)
    count = tl.where(end > begin, (end - 1) // each - begin // each + 1, 0)
    d = tl.program_id(2) * width + tl.arange(0, width)
    peak = float("-inf")
    total = 0.0
    sum_D = tl.zeros([width], tl.float32)
    for start in range(0, count, merged):
        i = start + tl.arange(0, merged)
        live = i < count
        part = (begin // each + r + i).to(tl.int64) * group + g
        peak_I = tl.load(peaks + part, mask=live, other=float("-inf"))
        total_I = tl.load(totals + part, mask=live, other=0.0)
        mask = live[:, None] & (d < dim)[None, :]
        sum_ID = tl.load(sums + part[:, None] * dim + d[None, :], mask=mask, other=0.0)
        higher = tl.maximum(peak, tl.max(peak_I, 0))
        fade = tl.exp2(peak - higher)
        weight_I = tl.exp2(peak_I - higher)
        total = total * fade + tl.sum(total_I * weight_I, 0)
        sum_D = sum_D * fade + tl.sum(sum_ID * weight_I[:, None], 0)
        peak = higher
    # A row that sees nothing has a total of 0: zeros / 1, and a log-sum-exp of -inf + 0.
    seen = tl.where(total > 0.0, total, 1.0)
    place = r.to(tl.int64) * group + g
    tl.store(out + place * dim + d, (sum_D / seen).to(out.dtype.element_ty), mask=d < dim)
    if tl.program_id(2) == 0:
        tl.store(lse + place, (peak + tl.log2(seen)) * 0.6931471805599453)
