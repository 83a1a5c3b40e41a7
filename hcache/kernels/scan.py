"""Scaled products of a few query rows with many key rows, in float32.

Shapes: X scans (each over its own stretch of the flat keys), R query rows of a scan, D numbers of a row (up
to 512), N keys of a block, `width` columns of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter

BLOCK = 64
"""N. Small blocks make many programs, which is what hides the latency of reading here."""

PIECE = 64
"""Numbers of a row in one product; longer rows take several. Twice as many leave half the programs an SM."""


def blocks_of(width: int) -> int:
    """Blocks of a row of `width` products."""
    return triton.cdiv(width, BLOCK)


def scan(
    rows_XRD: Tensor,
    keys: Tensor,
    first_X: Tensor,
    counts_X: Tensor,
    width: int,
    *,
    scale: float,
    wanted_X: Tensor | None = None,
    parts: Tensor | None = None,
) -> Tensor:
    """Products of each scan's R rows with its first `counts_X[x]` keys, times `scale`.

    No host synchronisation. Sums are in float32. Float32 rows with 16-bit keys are as good as with the keys
    converted to float32 (within 1e-5 of the sum of the products' magnitudes): see `_scan`.

    Args:
        rows_XRD: [X, R, D] in float32 or the dtype of the keys, R in 1..64.
        keys: [slots, D], contiguous.
        first_X: [X] int64, first key of each scan.
        counts_X: [X] int32 or int64, keys of each scan.
        wanted_X: [X] bool; what others write is undefined. None for all.
        parts: [2, X, R, blocks] float32 for what a softmax needs: the largest product of each block, and the
            sum of exponentials of what the others are below it.

    Returns:
        [X, R, width] float32, -inf from `counts_X[x]` on.
    """
    scans, rows, dim = rows_XRD.shape
    assert rows_XRD.dtype in (torch.float32, keys.dtype)
    assert keys.is_contiguous()
    logits = torch.empty(scans, rows, width, dtype=torch.float32, device=keys.device)
    if logits.numel():
        piece = min(PIECE, max(16, triton.next_power_of_2(dim)))
        _scan[(triton.cdiv(width, BLOCK), scans)](
            rows_XRD.contiguous(), keys, first_X, counts_X, counts_X if wanted_X is None else wanted_X,
            logits, logits if parts is None else parts, width, scale, rows,
            max(16, triton.next_power_of_2(rows)), dim, piece, rows_XRD.dtype != keys.dtype,
            wanted_X is not None, parts is not None, BLOCK,
            num_warps=4, num_stages=4, **chained(keys.device),
        )  # fmt: skip
    return logits


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    rows, keys, first, counts, wanted, logits, parts, width, scale, count_rows,
    rows_pad: tl.constexpr, dim: tl.constexpr, piece: tl.constexpr, mixed: tl.constexpr,
    some: tl.constexpr, parted: tl.constexpr, block: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """One program a block of keys.

    `mixed`: 16-bit keys are exact in tf32 (11 significant bits), and a float32 row is the sum of its upper 11
    significant bits, exact too, and a rest of 13 bits of which tf32 keeps 11: two products on tensor cores
    lose at most 2**-21 of a term, less than tensor cores lose in adding up. float32 keys take no tensor core.
    """
    enter(chain)
    x = tl.program_id(1).to(tl.int64)
    if some:  # noqa: SIM102 (decided while compiling)
        if tl.load(wanted + x) == 0:
            return
    r = tl.arange(0, rows_pad)
    n = tl.program_id(0) * block + tl.arange(0, block)
    live = n < tl.load(counts + x)
    slot = tl.load(first + x) + n
    sum_RN = tl.zeros([rows_pad, block], tl.float32)
    for start in range(0, dim, piece):
        d = start + tl.arange(0, piece)
        inside = (r < count_rows)[:, None] & (d < dim)[None, :]
        row_RD = tl.load(rows + (x * count_rows + r)[:, None] * dim + d[None, :], mask=inside, other=0.0)
        k_ND = tl.load(
            keys + slot[:, None] * dim + d[None, :], mask=live[:, None] & (d < dim)[None, :], other=0.0
        )
        if mixed:
            wide_DN = tl.trans(k_ND).to(tl.float32)
            upper_RD = (row_RD.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
            sum_RN = tl.dot(row_RD - upper_RD, wide_DN, sum_RN, input_precision="tf32")
            sum_RN = tl.dot(upper_RD, wide_DN, sum_RN, input_precision="tf32")
        else:
            sum_RN = tl.dot(row_RD, tl.trans(k_ND), sum_RN, input_precision="ieee")
    sum_RN = tl.where(live[None, :], sum_RN * scale, float("-inf"))
    place = (x * count_rows + r)[:, None] * width + n[None, :]
    tl.store(logits + place, sum_RN, mask=(r < count_rows)[:, None] & (n < width)[None, :])
    if parted:
        peak_R = tl.max(sum_RN, 1)
        # A block behind the keys: exp(-inf - 0) = 0 rather than NaN.
        below_RN = sum_RN - tl.where(peak_R == float("-inf"), 0.0, peak_R)[:, None]
        part = (x * count_rows + r) * tl.num_programs(0) + tl.program_id(0)
        tl.store(parts + part, peak_R, mask=r < count_rows)
        behind = tl.num_programs(1).to(tl.int64) * count_rows * tl.num_programs(0)
        tl.store(parts + behind + part, tl.sum(tl.exp(below_RN), 1), mask=r < count_rows)
