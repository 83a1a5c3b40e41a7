"""Attention that each token of a prompt receives from all queries, without ever writing a row of it down.

Two passes over causal tiles of q.k: the first finds every row's log-sum-exp, the second adds up what a block
of columns receives from the rows below it. Only one float32 number a row and a column reaches memory. Each
column block has one owner that walks its rows in order: no atomics, bit-equal from run to run.

Shapes: q [Hq, n, D], k [H, n, D], G = Hq/H; a program owns N rows or columns and walks over M others at a
time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class Tuning(NamedTuple):
    """How both passes are compiled and launched."""

    own: int
    """N, rows or columns of a program; a power of two, a multiple of `other`."""
    other: int
    """M, columns or rows it walks over at a time; a power of two, at least 16."""
    warps: int
    stages: int


TUNING = Tuning(128, 64, 8, 3)
"""80 KiB of shared memory a program at head dim 128 in half precision."""

WIDE_TUNING = Tuning(64, 32, 4, 3)
"""For head dims above 128."""


def column_sums(q_HqnD: Tensor, k_HnD: Tensor, tuning: Tuning | None = None) -> Tensor:
    """Causal softmax attention of scale D**-0.5, summed over the queries of a group: [H, n] float32.

    Logits and sums are float32 whatever the dtype. No host synchronisation; scratch is one number a row.
    """
    heads, tokens, dim = k_HnD.shape
    assert q_HqnD.dtype == k_HnD.dtype
    assert q_HqnD.shape[0] % heads == 0
    q_HqnD, k_HnD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_HqnD, k_HnD))
    dim_pad = max(16, triton.next_power_of_2(dim))
    own, other, warps, stages = tuning or (TUNING if dim_pad <= 128 else WIDE_TUNING)
    assert own % other == 0
    lse_Hqn = torch.empty(q_HqnD.shape[:2], dtype=torch.float32, device=k_HnD.device)
    sums_Hn = torch.empty(heads, tokens, dtype=torch.float32, device=k_HnD.device)
    shape = (
        tokens, dim**-0.5 * LOG2_E, q_HqnD.stride(0), q_HqnD.stride(1), k_HnD.stride(0), k_HnD.stride(1),
        q_HqnD.shape[0] // heads, dim, dim_pad, own, other,
    )  # fmt: skip
    blocks = triton.cdiv(tokens, own)
    # Triton launches on the current device; a layer may be on another one.
    with torch.cuda.device_of(k_HnD):
        _rows[(blocks, q_HqnD.shape[0])](q_HqnD, k_HnD, lse_Hqn, *shape, num_warps=warps, num_stages=stages)
        _columns[(blocks, heads)](q_HqnD, k_HnD, lse_Hqn, sums_Hn, *shape, num_warps=warps, num_stages=stages)
    return sums_Hn


@triton.jit
def _tile(base, at, tokens, stride, size: tl.constexpr, dim: tl.constexpr, dim_pad: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens at .. at+size of one head [size, D'], zeros behind the last."""
    t = at + tl.arange(0, size)
    d = tl.arange(0, dim_pad)
    mask = (t < tokens)[:, None] & (d < dim)[None, :]
    return tl.load(base + t.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    q, k, lse, tokens, scale, q_head, q_token, k_head, k_token,
    group: tl.constexpr, dim: tl.constexpr, dim_pad: tl.constexpr, own: tl.constexpr, other: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, in units of log2, of N rows of one query head."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * own  # the rows with most columns begin first
    head = tl.program_id(1).to(tl.int64)
    keys = k + head // group * k_head
    q_ND = _tile(q + head * q_head, start, tokens, q_token, own, dim, dim_pad)
    row = start + tl.arange(0, own)
    peak_N = tl.full([own], float("-inf"), tl.float32)
    total_N = tl.zeros([own], tl.float32)
    for at in range(0, start, other):
        k_MD = _tile(keys, at, tokens, k_token, other, dim, dim_pad)
        logit_NM = tl.dot(q_ND, tl.trans(k_MD), input_precision="ieee") * scale
        peak_N, total_N = _fold(logit_NM, peak_N, total_N)
    for at in range(start, start + own, other):
        k_MD = _tile(keys, at, tokens, k_token, other, dim, dim_pad)
        logit_NM = tl.dot(q_ND, tl.trans(k_MD), input_precision="ieee") * scale
        seen_NM = (at + tl.arange(0, other))[None, :] <= row[:, None]
        peak_N, total_N = _fold(tl.where(seen_NM, logit_NM, float("-inf")), peak_N, total_N)
    tl.store(lse + head * tokens + row, peak_N + tl.log2(total_N), mask=row < tokens)


@triton.jit
def _fold(logit_NM, peak_N, total_N):  # type: ignore[no-untyped-def]
    """One more tile of an online softmax. The first tile shows every row a column, so no peak stays -inf."""
    higher_N = tl.maximum(peak_N, tl.max(logit_NM, 1))
    fresh_N = tl.sum(tl.exp2(logit_NM - higher_N[:, None]), 1)
    return higher_N, total_N * tl.exp2(peak_N - higher_N) + fresh_N


@triton.jit
def _columns(  # type: ignore[no-untyped-def]
    q, k, lse, sums, tokens, scale, q_head, q_token, k_head, k_token,
    group: tl.constexpr, dim: tl.constexpr, dim_pad: tl.constexpr, own: tl.constexpr, other: tl.constexpr,
):  # fmt: skip
    """What N columns of one KV head receive from the rows of its group."""
    start = tl.program_id(0) * own
    kv_head = tl.program_id(1).to(tl.int64)
    k_ND = _tile(k + kv_head * k_head, start, tokens, k_token, own, dim, dim_pad)
    column = start + tl.arange(0, own)
    # Summed over rows only at the end: a reduction in every tile would cost more than its product.
    sum_NM = tl.zeros([own, other], tl.float32)
    for g in range(group):
        head = kv_head * group + g
        rows, norms = q + head * q_head, lse + head * tokens
        for at in range(start, start + own, other):
            log_NM = _log_weights(k_ND, rows, norms, at, tokens, scale, q_token, dim, dim_pad, other)
            seen_NM = column[:, None] <= (at + tl.arange(0, other))[None, :]
            sum_NM += tl.exp2(tl.where(seen_NM, log_NM, float("-inf")))
        for at in range(start + own, tokens, other):
            log_NM = _log_weights(k_ND, rows, norms, at, tokens, scale, q_token, dim, dim_pad, other)
            sum_NM += tl.exp2(log_NM)
    tl.store(sums + kv_head * tokens + column, tl.sum(sum_NM, 1), mask=column < tokens)


@triton.jit
def _log_weights(  # type: ignore[no-untyped-def]
    k_ND, rows, norms, at, tokens, scale, q_token,
    dim: tl.constexpr, dim_pad: tl.constexpr, other: tl.constexpr,
):  # fmt: skip
    """log2 of the attention [N, M] of M rows for N columns; -inf for rows that don't exist."""
    q_MD = _tile(rows, at, tokens, q_token, other, dim, dim_pad)
    row = at + tl.arange(0, other)
    norm_M = tl.load(norms + row, mask=row < tokens, other=float("inf"))
    return tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * scale - norm_M[None, :]
