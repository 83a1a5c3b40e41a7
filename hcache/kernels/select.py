"""Positions of the largest scores of each row, exactly as `hcache.scoring.top_positions` picks them.

Shapes: X rows, N scores of a row, `width` places of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 65536
"""Scores of a row, at most."""

HELD = 32768
"""Scores that one program holds in registers, at most: 64 a thread."""


def select(scores_XN: Tensor, counts_X: Tensor, width: int) -> Tensor:
    """Positions of the `counts_X[x]` largest scores of each row, ascending; ties go to the earlier position.

    No host synchronisation. -inf is an ordinary score; NaN is lower than all others.

    Args:
        scores_XN: [X, N] float32, contiguous, N up to MOST.
        counts_X: [X] int32 or int64, at most min(N, width) each; what is above counts as that.
        width: places of the result.

    Returns:
        [X, width] int32; places from `counts_X[x]` on hold N.

    Raises:
        ValueError: more than MOST scores a row.
    """
    rows, tokens = scores_XN.shape
    if tokens > MOST:
        raise ValueError(
            f"select: {tokens} scores a row are more than {MOST}, the most it takes; use torch.topk there"
        )
    assert scores_XN.dtype == torch.float32
    assert scores_XN.is_contiguous()
    positions = torch.empty(rows, width, dtype=torch.int32, device=scores_XN.device)
    if not tokens:
        return positions.fill_(tokens)
    if positions.numel():
        pad = max(16, triton.next_power_of_2(tokens))
        part = pad if pad <= HELD else HELD // 2
        warps = 4 if part <= 2048 else 8 if part <= 8192 else 16
        _select[(rows,)](
            scores_XN, counts_X, positions, tokens, width,
            triton.cdiv(tokens, part), part, triton.next_power_of_2(width), num_warps=warps,
        )  # fmt: skip
    return positions


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    scores, counts, positions, tokens, width, parts: tl.constexpr, part: tl.constexpr, width_pad: tl.constexpr
):
    """One program a row: bit by bit the highest threshold that `count` scores reach, then compaction.

    The first part of a row stays in registers, the others are read again for each bit, from a cache.
    """
    x = tl.program_id(0).to(tl.int64)
    row = scores + x * tokens
    n = tl.arange(0, part)
    count = tl.minimum(tl.load(counts + x).to(tl.int32), tl.minimum(tokens, width))
    ranks = _load_ranks(row, n, tokens)
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    reached = tl.full([], parts * part, tl.int32)
    # Once exactly `count` scores reach the threshold, lower bits cannot change what is taken.
    while (bit != 0) & (reached != count):
        higher = threshold | bit
        reaching = (ranks >= higher).to(tl.int32)
        for p in range(1, parts):
            reaching += (_load_ranks(row, p * part + n, tokens) >= higher).to(tl.int32)
        above = tl.sum(reaching, 0)
        enough = above >= count
        threshold = tl.where(enough, higher, threshold)
        reached = tl.where(enough, above, reached)
        bit = bit >> 1
    greater = (ranks > threshold).to(tl.int32)
    for p in range(1, parts):
        greater += (_load_ranks(row, p * part + n, tokens) > threshold).to(tl.int32)
    missing = count - tl.sum(greater, 0)
    higher_before = tl.full([], 0, tl.int32)
    ties_before = tl.full([], 0, tl.int32)
    for p in tl.static_range(parts):
        if p > 0:
            ranks = _load_ranks(row, p * part + n, tokens)
        # One scan for both counts, in halves of a word: a part is shorter than 2**16.
        both = (ranks > threshold).to(tl.int32) | ((ranks == threshold).to(tl.int32) << 16)
        before = tl.cumsum(both, 0) - both
        ties = ties_before + (before >> 16)
        taken = (ranks > threshold) | ((ranks == threshold) & (ties < missing))
        place = higher_before + (before & 0xFFFF) + tl.minimum(ties, missing)
        tl.store(positions + x * width + place, p * part + n, mask=taken & (place < count))
        all_of_part = tl.sum(both, 0)
        higher_before += all_of_part & 0xFFFF
        ties_before += all_of_part >> 16
    w = tl.arange(0, width_pad)
    tl.store(positions + x * width + w, tokens, mask=(w >= count) & (w < width))


@triton.jit
def _load_ranks(row, n, tokens):  # type: ignore[no-untyped-def]
    """uint32 numbers in the order of the scores: equal for 0.0 and -0.0, and 0 for NaN and behind the end.

    What is behind the end is never taken: no real score ranks lower, and ties go to the earlier position.
    """
    score = tl.load(row + n, mask=n < tokens, other=float("nan"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    ranks = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(score == score, ranks, 0)
