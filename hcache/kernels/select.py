"""Positions of the largest scores of each row, exactly as `hcache.scoring.top_positions` picks them.

Shapes: X rows, N scores of a row, `width` places of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave

MOST = 65536
"""Scores of a row, at most."""

HELD = 32768
"""Scores that one program holds in registers, at most: 64 a thread."""


def select(
    scores_XN: Tensor, counts_X: Tensor, width: int,
    rest_S: Tensor | None = None, out_XW: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Positions of the `counts_X[x]` largest scores of each row, ascending; ties go to the earlier position.

    No host synchronisation. -inf is an ordinary score; NaN is lower than all others.

    Args:
        scores_XN: [X, N] float32, contiguous, N up to MOST.
        counts_X: [X] int32 or int64, at most min(N, width) each; what is above counts as that.
        width: places of the result.
        rest_S: [S] int32, what places from `counts_X[x]` on hold, each for X/S neighbouring rows; None: N.
        out_XW: [X, width] int32, contiguous, takes the result; None: a new tensor.

    Returns:
        [X, width] int32; places from `counts_X[x]` on hold N, or what `rest_S` says.

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
    positions = out_XW
    if positions is None:
        positions = torch.empty(rows, width, dtype=torch.int32, device=scores_XN.device)
    assert positions.shape == (rows, width)
    assert positions.dtype == torch.int32
    assert positions.is_contiguous()
    if not tokens:
        assert rest_S is None
        return positions.fill_(tokens)
    if positions.numel():
        pad = max(16, triton.next_power_of_2(tokens))
        part = pad if pad <= HELD else HELD // 2
        warps = 4 if part <= 2048 else 8 if part <= 8192 else 16
        _select[(rows,)](
            scores_XN, counts_X, positions, counts_X if rest_S is None else rest_S, tokens, width,
            0 if rest_S is None else rows // rest_S.numel(),
            triton.cdiv(tokens, part), part, triton.next_power_of_2(width),
            num_warps=warps, **chained(scores_XN.device),
        )  # fmt: skip
    return positions


@triton.jit
def _select(  # type: ignore[no-untyped-def]
    scores, counts, positions, rest, tokens, width,
    sharing: tl.constexpr, parts: tl.constexpr, part: tl.constexpr, width_pad: tl.constexpr,
    chain: tl.constexpr,
):  # fmt: skip
    """One program a row: the highest threshold that `count` scores reach, in thirds, then compaction.

    At least `count` ranks reach `threshold` and fewer reach `end`. What a round costs is the comparisons, so
    it makes two, counted in one sum, and the first round leaves only what lies between the finite scores.
    The first part of a row stays in registers, the others are read again in each round, from a cache.
    `sharing`: rows for which a number of `rest` is, 0 if there are none.
    """
    enter(chain)
    leave(chain)
    x = tl.program_id(0).to(tl.int64)
    row = scores + x * tokens
    n = tl.arange(0, part)
    count = tl.minimum(tl.load(counts + x).to(tl.int32), tl.minimum(tokens, width))
    ranks = _load_ranks(row, n, tokens)
    threshold = tl.full([], 0, tl.uint32)
    end = tl.full([], 0xFF800001, tl.uint32)  # behind +inf
    finite = (ranks > 0x007FFFFF) & (ranks < 0xFF800000)
    low = tl.min(tl.where(finite, ranks, 0xFF800000), 0)
    high = tl.max(tl.where(finite, ranks, 0), 0) + 1
    low = tl.maximum(low, 1)
    reached = tl.full([], parts * part, tl.int32)
    half: tl.constexpr = 16 if parts * part < 32768 else 32
    # Once exactly `count` scores reach the threshold, a higher one cannot change what is taken.
    while (end - threshold > 1) & (reached != count):
        both = _reaching(ranks, low, high, half)
        for p in range(1, parts):
            both += _reaching(_load_ranks(row, p * part + n, tokens), low, high, half)
        above = tl.sum(both, 0)
        reach_low = (above & ((1 << half) - 1)).to(tl.int32)
        reach_high = ((above >> half) & ((1 << half) - 1)).to(tl.int32)
        end = tl.where(reach_low < count, tl.minimum(end, low), end)
        end = tl.where(reach_high < count, tl.minimum(end, high), end)
        better = (reach_low >= count) & (low > threshold)
        threshold = tl.where(better, low, threshold)
        reached = tl.where(better, reach_low, reached)
        better = (reach_high >= count) & (high > threshold)
        threshold = tl.where(better, high, threshold)
        reached = tl.where(better, reach_high, reached)
        third = tl.maximum((end - threshold) // 3, 1)
        low = threshold + third
        high = end - third
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
    if sharing > 0:
        tokens = tl.load(rest + x // sharing)
    tl.store(positions + x * width + w, tokens, mask=(w >= count) & (w < width))


@triton.jit
def _reaching(ranks, low, high, half: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which ranks reach either threshold, in halves of a word, `half` bits each, that hold their sums."""
    word: tl.constexpr = tl.int32 if half == 16 else tl.int64
    return (ranks >= low).to(word) + ((ranks >= high).to(word) << half)


@triton.jit
def _load_ranks(row, n, tokens):  # type: ignore[no-untyped-def]
    """uint32 numbers in the order of the scores: equal for 0.0 and -0.0, and 0 for NaN and behind the end.

    What is behind the end is never taken: no real score ranks lower, and ties go to the earlier position.
    """
    score = tl.load(row + n, mask=n < tokens, other=float("nan"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    ranks = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(score == score, ranks, 0)
