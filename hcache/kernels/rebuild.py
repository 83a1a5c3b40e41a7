"""Rebuild listed chunks of keys from low-rank factors, turn them to their positions, and write them into a
store, in one launch.

Source: ShadowKV, ICML 2025, arXiv 2410.21465 (section 4.2: gather, product and rotary embedding fused).
Shapes: S segments (one a sequence and KV head), M places of a list, D head dim, r rank, F rotary frequencies,
T tokens that a program rebuilds at once, N rows of all factors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32
"""T."""

RANKS = 32
"""Columns of the factors that are multiplied at once."""

PROGRAMS = 512
"""About how many programs all segments have; those that find nothing listed end at once."""


def rebuild(
    rows_Nr: Tensor,
    basis_SrD: Tensor,
    row_first_S: Tensor,
    frequencies_F: Tensor,
    scaling: float,
    keys: Tensor,
    key_first_S: Tensor,
    chunks_SM: Tensor,
    places_SM: Tensor,
    counts_S: Tensor,
    size: int,
) -> None:
    """Write, for each listed place p, the keys of `size` positions from size * chunks_SM[s, p] on into slots
    from size * p on of the segment.

    A key is row @ basis, summed in float32, then turned as in `hcache.attention.rope.Halves` by its position.
    No host synchronisation. What is not listed costs nothing.

    Args:
        rows_Nr: [N, r], contiguous; position t of segment s is row `row_first_S[s] + t`.
        basis_SrD: [S, r, D] of the same dtype, contiguous.
        row_first_S, key_first_S: [S] int64.
        frequencies_F: [F] float32; 2F is at most D.
        keys: [slots, D], contiguous.
        chunks_SM: [S, M] int32, contiguous.
        places_SM: [S, M] int32, contiguous; the first `counts_S[s]` are listed.
        counts_S: [S] int32.
    """
    segments, rank, dim = basis_SrD.shape
    width, half = chunks_SM.shape[1], frequencies_F.shape[0]
    assert all(x.is_contiguous() for x in (rows_Nr, basis_SrD, keys, chunks_SM, places_SM))
    assert (rows_Nr.shape[1], rows_Nr.dtype) == (rank, basis_SrD.dtype)
    assert 2 * half <= dim
    each = max(1, min(PROGRAMS // segments, triton.cdiv(width * size, TOKENS)))
    _rebuild[(each, segments)](
        rows_Nr, basis_SrD, row_first_S, frequencies_F, scaling, keys, key_first_S, chunks_SM, places_SM,
        counts_S, width, size, rank, RANKS, dim, half, _pad(half), _pad(dim - 2 * half), TOKENS,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _pad(number: int) -> int:
    """Columns of a product on tensor cores, which has at least 16."""
    return max(16, triton.next_power_of_2(number))


@triton.jit
def _rebuild(  # type: ignore[no-untyped-def]
    rows, basis, row_first, frequencies, scaling, keys, key_first, chunks, places, counts, width,
    size: tl.constexpr, rank: tl.constexpr, ranks: tl.constexpr, dim: tl.constexpr, half: tl.constexpr,
    half_pad: tl.constexpr, rest_pad: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    """Program p of a segment rebuilds blocks p, p + P, p + 2P, ... of its list."""
    s = tl.program_id(1).to(tl.int64)
    total = tl.load(counts + s) * size
    basis += s * rank * dim
    f = tl.arange(0, half_pad)
    for start in range(tl.program_id(0) * tokens, total, tl.num_programs(0) * tokens):
        i = start + tl.arange(0, tokens)
        live = i < total
        place = tl.load(places + s * width + i // size, mask=live, other=0)
        position = tl.load(chunks + s * width + place, mask=live, other=0).to(tl.int64) * size + i % size
        row_T = rows + (tl.load(row_first + s) + position) * rank
        key_T = keys + (tl.load(key_first + s) + place.to(tl.int64) * size + i % size) * dim
        left_TF = _product(row_T, live, basis, 0, half, rank, dim, ranks, half_pad, tokens)
        right_TF = _product(row_T, live, basis, half, half, rank, dim, ranks, half_pad, tokens)
        cos_TF, sin_TF = _turn(position, tl.load(frequencies + f, mask=f < half, other=0.0))
        mask = live[:, None] & (f < half)[None, :]
        turned_TF = (left_TF * cos_TF - right_TF * sin_TF) * scaling
        tl.store(key_T[:, None] + f[None, :], turned_TF.to(keys.dtype.element_ty), mask=mask)
        turned_TF = (right_TF * cos_TF + left_TF * sin_TF) * scaling
        tl.store(key_T[:, None] + half + f[None, :], turned_TF.to(keys.dtype.element_ty), mask=mask)
        if 2 * half < dim:
            rest = tl.arange(0, rest_pad)
            rest_TD = _product(
                row_T, live, basis, 2 * half, dim - 2 * half, rank, dim, ranks, rest_pad, tokens
            )
            mask = live[:, None] & (rest < dim - 2 * half)[None, :]
            tl.store(key_T[:, None] + 2 * half + rest[None, :], rest_TD.to(keys.dtype.element_ty), mask=mask)


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    row_T, live, basis, begin, count, rank: tl.constexpr, dim: tl.constexpr, ranks: tl.constexpr,
    pad: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    """Columns begin to begin + count of the listed rows' products with the basis, [T, pad] float32."""
    c = tl.arange(0, pad)
    sum_Tc = tl.zeros([tokens, pad], tl.float32)
    for first in range(0, rank, ranks):
        r = first + tl.arange(0, ranks)
        row_Tr = tl.load(row_T[:, None] + r[None, :], mask=live[:, None] & (r < rank)[None, :], other=0.0)
        inside = (r < rank)[:, None] & (c < count)[None, :]
        basis_rc = tl.load(basis + r[:, None] * dim + begin + c[None, :], mask=inside, other=0.0)
        sum_Tc = tl.dot(row_Tr, basis_rc, sum_Tc, input_precision="ieee")
    return sum_Tc


@triton.jit
def _turn(position, frequency_F):  # type: ignore[no-untyped-def]
    """cos and sin of position * frequency, a float32 product as in transformers."""
    angle_TF = position.to(tl.float32)[:, None] * frequency_F[None, :]
    return tl.cos(angle_TF), tl.sin(angle_TF)
