"""HeteroCache's pivots: their queries are collected, and their prompts searched for what is looked at now.

The largest `count` scores of a row are found without sorting it: digit by digit of their bits, histograms
tell how many scores are above, until the threshold is known exactly, and how many of those equal to it belong
to the largest (the earliest ones). Every launch over scores spreads a row over many programs, so that long
prompts take no longer than the device needs to read them. It all runs beside steps of decoding: little work
counts as much as little time, and programs without work end at once.

Shapes: S segments, P pivots, W queries of a window, G query heads of a pivot, D head dim, N room for prompt
tokens, Q satellites, K room for the tokens of one; X = P*W + Q searches (the window's queries of each pivot
for its reference, then each satellite's in the latest query's scores), C chunks of a row, B blocks of a scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Scores of a row that a program searches."""

SMOOTHED = 1024
"""Scores that a program makes; a thread makes 4 neighbours, from kernel + 3 logits of each head."""

DIGITS = 4
BINS = 256
HISTOGRAMS = DIGITS * BINS
"""A float32 without its sign is so many digits of so many values; a search counts the values of each."""

SPARSE = 128
"""So few scores of a chunk are counted one by one: a histogram's work is that of all of them."""

BY_OVERLAP = -1
"""Stands for `every=None` in a kernel."""


def observe(
    q: Tensor,
    lengths_S: Tensor,
    segment_P: Tensor,
    tokens_P: Tensor,
    queries_PWGD: Tensor,
    finished_PWGD: Tensor,
    full_P: Tensor,
) -> None:
    """Take the pivots' queries of a token that every sequence has just had. No host synchronisation.

    Args:
        q: [B, Hq, 1, D], of which segment s has rows s*G to s*G + G.
        lengths_S: [S] int32, tokens of each segment with this one.
        segment_P, tokens_P: [P] int64, each pivot's segment and prompt tokens in it.
        queries_PWGD: the window's queries so far; that of the t-th token goes to place (t - 1) % W.
        finished_PWGD: where the last place is filled, the whole window is copied here,
        full_P: [P] bool, and this set; otherwise neither is touched.
    """
    pivots, steps, group, dim = queries_PWGD.shape
    numbers = group * dim
    _observe[(pivots,)](
        q.reshape(-1, numbers), lengths_S, segment_P, tokens_P, queries_PWGD, finished_PWGD, full_P,
        steps, numbers, triton.next_power_of_2(numbers), num_warps=4,
    )  # fmt: skip


def review(
    logits_PWGN: Tensor,
    parts: Tensor,
    tokens_P: Tensor,
    base_P: Tensor,
    pivot_Q: Tensor,
    sizes_Q: Tensor,
    full_P: Tensor,
    reference_PN: Tensor,
    chosen_QK: Tensor,
    windows_P: Tensor,
    triggers_P: Tensor,
    coming_Q: Tensor | None = None,
    *,
    kernel: int,
    average: bool,
    group: str,
    threshold: float,
    every: int | None,
) -> Tensor:
    """Decide which pivots have drifted, and renew what follows from it. No host synchronisation.

    Where a pivot's window is full and the median overlap of its queries' largest `base` positions with its
    reference falls below `threshold`, the reference becomes the last query's set, and each of its satellites'
    `chosen` that query's largest positions, as many as it holds, ascending.

    Args:
        logits_PWGN: float32, -inf behind a prompt; anything where a window is not full.
        parts: [2, P, W*G, B] float32, of hcache.kernels.scan.
        tokens_P, base_P: [P] int64, prompt tokens, and size of a reference (1 to tokens).
        pivot_Q, sizes_Q: [Q] int64, each satellite's pivot, and tokens that it holds (0 to tokens - 1).
        full_P: [P] bool, pivots to decide about; cleared.
        reference_PN: bool, renewed in place.
        chosen_QK: int32, renewed in place; what is behind a satellite's own stays.
        windows_P, triggers_P: [P] int64; grow by 1 with a full window, and with a drift.
        coming_Q: [Q] bool, set where the pivot has drifted and the satellite holds any tokens.
        kernel, average, group: pooling over so many neighbours (their maximum if not average), and "max",
            "mean" or "sum" over G.
        every: None, or drift in every so-many-th window instead (0: never).

    Returns:
        [Q] int64: `sizes_Q` where the pivot has drifted, else 0.
    """
    pivots, steps, _, width = logits_PWGN.shape
    rows, satellites, room = pivots * steps, *chosen_QK.shape
    chunks, searches = triton.cdiv(width, CHUNK), rows + satellites
    assert reference_PN.shape == (pivots, width)
    histograms = torch.zeros(searches, HISTOGRAMS, dtype=torch.int32, device=full_P.device)
    scores = smooth(
        logits_PWGN, parts, tokens_P, full_P, histograms, kernel=kernel, average=average, group=group
    )
    states, found = histograms.new_empty(searches, DIGITS, 2), histograms.new_empty(searches, 4, chunks)
    search = (scores, base_P, pivot_Q, sizes_Q, states, rows, steps, width)
    for digit in range(1, DIGITS):
        _count_digits[(chunks, searches)](*search, histograms, full_P, digit, SPARSE, CHUNK, num_warps=8)
    _count_found[(chunks, searches)](
        *search, histograms, full_P, found, reference_PN, chunks, CHUNK, num_warps=8
    )
    pad = triton.next_power_of_2(chunks)
    drifted = histograms.new_empty(pivots)
    _decide[(pivots,)](
        *search, found, reference_PN, full_P, windows_P, triggers_P, drifted, threshold, chunks, pad,
        triton.next_power_of_2(steps), BY_OVERLAP if every is None else every, CHUNK, num_warps=8,
    )  # fmt: skip
    fresh_Q = torch.empty_like(sizes_Q)
    _renew[(chunks, pivots + satellites)](
        *search, found, reference_PN, drifted, chosen_QK, fresh_Q, fresh_Q if coming_Q is None else coming_Q,
        pivots, room, chunks, pad, coming_Q is not None, CHUNK, num_warps=8,
    )  # fmt: skip
    return fresh_Q


def smooth(
    logits_PWGN: Tensor,
    parts: Tensor,
    tokens_P: Tensor,
    full_P: Tensor,
    histograms: Tensor,
    *,
    kernel: int,
    average: bool,
    group: str,
) -> Tensor:
    """Scores [P, W, N]: softmax, pooled over neighbours, joined over the group; -1 behind a prompt.

    Where a window is not full they are undefined. The first digits are counted in `histograms`, whose first
    P*W rows are those of the scores.
    """
    pivots, steps, heads, width = logits_PWGN.shape
    rows, blocks = pivots * steps, parts.shape[-1]
    assert parts.shape[:3] == (2, pivots, steps * heads)
    assert logits_PWGN.is_contiguous()
    assert parts.is_contiguous()
    norms = parts.new_empty(2, rows * heads)
    _normalise[(rows * heads,)](
        parts, norms, full_P, steps * heads, blocks, triton.next_power_of_2(blocks), num_warps=8
    )
    scores = logits_PWGN.new_empty(pivots, steps, width)
    _smooth[(triton.cdiv(width, SMOOTHED), rows)](
        logits_PWGN, norms, tokens_P, full_P, scores, histograms, width, steps, rows * heads,
        heads, kernel, average, group, SMOOTHED // 4, num_warps=4,
    )  # fmt: skip
    return scores


def arrive(
    lengths_S: Tensor,
    segment_P: Tensor,
    tokens_P: Tensor,
    sequence_P: Tensor,
    pivot_Q: Tensor,
    sizes_Q: Tensor,
    chosen_QK: Tensor,
    held_QK: Tensor,
    coming_Q: Tensor,
    real_B: Tensor | None,
    *,
    steps: int,
    visible_after: int,
) -> Tensor:
    """Satellites whose coming rows the coming token is the first to see. No host synchronisation.

    Args:
        lengths_S, segment_P, tokens_P: as of `observe`, before the token.
        sequence_P: [P] int64, each pivot's sequence.
        pivot_Q, sizes_Q: as of `review`.
        chosen_QK, held_QK: int32; for those satellites, what is chosen becomes what is held.
        coming_Q: [Q] bool, cleared for them.
        real_B: [B] bool, which sequences have the token; None for all.

    Returns:
        [Q] int64: `sizes_Q` for those satellites, else 0.
    """
    counts_Q = torch.empty_like(sizes_Q)
    satellites, room = chosen_QK.shape
    _arrive[(satellites,)](
        lengths_S, segment_P, tokens_P, sequence_P, pivot_Q, sizes_Q, chosen_QK, held_QK, coming_Q,
        coming_Q if real_B is None else real_B, counts_Q, 0 if real_B is None else real_B.stride(0),
        room, steps, visible_after, real_B is not None, CHUNK, num_warps=8,
    )  # fmt: skip
    return counts_Q


@triton.jit
def _observe(  # type: ignore[no-untyped-def]
    q, lengths, segments, tokens, queries, finished, full, steps, numbers: tl.constexpr, pad: tl.constexpr
):
    """One program a pivot."""
    p = tl.program_id(0)
    i = tl.arange(0, pad)
    inside = i < numbers
    segment = tl.load(segments + p)
    place = (tl.load(lengths + segment) - tl.load(tokens + p) - 1) % steps
    row = tl.load(q + segment * numbers + i, mask=inside)
    window = p * steps * numbers + i
    tl.store(queries + window + place * numbers, row, mask=inside)
    if place == steps - 1:
        for w in range(steps - 1):
            earlier = tl.load(queries + window + w * numbers, mask=inside)
            tl.store(finished + window + w * numbers, earlier, mask=inside)
        tl.store(finished + window + place * numbers, row, mask=inside)
        tl.store(full + p, place == place)


@triton.jit
def _arrive(  # type: ignore[no-untyped-def]
    lengths, segments, tokens, sequences, pivots, sizes, chosen, held, coming, real, counts, real_stride,
    room, steps, visible_after, some: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program a satellite."""
    q = tl.program_id(0).to(tl.int64)
    p = tl.load(pivots + q)
    fed = tl.load(lengths + tl.load(segments + p)) - tl.load(tokens + p)
    arrives = (tl.load(coming + q) != 0) & ((fed + 1 - visible_after) % steps == 0)
    if some:
        arrives = arrives & (tl.load(real + tl.load(sequences + p) * real_stride) != 0)
    size = tl.where(arrives, tl.load(sizes + q), 0)
    tl.store(counts + q, size)
    if arrives:
        for start in range(0, size.to(tl.int32), block):
            i = start + tl.arange(0, block)
            tl.store(held + q * room + i, tl.load(chosen + q * room + i, mask=i < size), mask=i < size)
        tl.store(coming + q, q < 0)


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    parts, norms, full, shared, blocks, blocks_pad: tl.constexpr
):
    """Of a row of logits: its maximum, times log2(e), and one by its sum of exponentials below that."""
    r = tl.program_id(0).to(tl.int64)
    if tl.load(full + r // shared) == 0:
        return
    b = tl.arange(0, blocks_pad)
    total_rows = tl.num_programs(0)
    peak_B = tl.load(parts + r * blocks + b, mask=b < blocks, other=float("-inf"))
    total_B = tl.load(parts + (total_rows + r) * blocks + b, mask=b < blocks, other=0.0)
    peak = tl.max(peak_B, 0)
    total = tl.sum(total_B * tl.exp(peak_B - peak), 0)
    tl.store(norms + r, peak * 1.4426950408889634)
    tl.store(norms + total_rows + r, 1.0 / total)


@triton.jit
def _smooth(  # type: ignore[no-untyped-def]
    logits, norms, tokens, full, scores, histograms, width, steps, total_rows,
    heads: tl.constexpr, kernel: tl.constexpr, average: tl.constexpr, group: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Four times `block` scores of a row, from the logits of its G heads."""
    row = tl.program_id(1).to(tl.int64)
    p = row // steps
    if tl.load(full + p) == 0:
        return
    first = (tl.program_id(0) * block + tl.arange(0, block)) * 4
    # Four variables rather than an axis: neighbours must share what a thread has loaded.
    none = tl.zeros([block], tl.float32)
    joined_0, joined_1, joined_2, joined_3 = none, none, none, none
    for g in range(heads):
        r = row * heads + g
        peak = tl.load(norms + r)
        weight = tl.load(norms + total_rows + r)
        pooled_0, pooled_1, pooled_2, pooled_3 = none, none, none, none
        for j in tl.static_range(kernel + 3):
            m = first + (j - kernel // 2)
            logit = tl.load(logits + r * width + m, mask=(m >= 0) & (m < width), other=float("-inf"))
            share = tl.exp2(logit * 1.4426950408889634 - peak)
            pooled_0 = _pool(pooled_0, share, 0, j, kernel, average)
            pooled_1 = _pool(pooled_1, share, 1, j, kernel, average)
            pooled_2 = _pool(pooled_2, share, 2, j, kernel, average)
            pooled_3 = _pool(pooled_3, share, 3, j, kernel, average)
        if average:
            weight = weight / kernel
        joined_0 = _join(joined_0, pooled_0 * weight, group)
        joined_1 = _join(joined_1, pooled_1 * weight, group)
        joined_2 = _join(joined_2, pooled_2 * weight, group)
        joined_3 = _join(joined_3, pooled_3 * weight, group)
    even_odd = tl.join(tl.join(joined_0, joined_2), tl.join(joined_1, joined_3))
    joined = tl.reshape(even_odd, [block * 4])
    if group == "mean":
        joined = joined / heads
    n = tl.program_id(0) * block * 4 + tl.arange(0, block * 4)
    live = n < tl.load(tokens + p)
    tl.store(scores + row * width + n, tl.where(live, joined, -1.0), mask=n < width)
    digit = tl.where(live, joined.to(tl.int32, bitcast=True) >> 23, 0)
    _count_all(histograms + row * 1024, digit, tl.sum((~live).to(tl.int32), 0))


@triton.jit
def _pool(  # type: ignore[no-untyped-def]
    pooled, share, place: tl.constexpr, j: tl.constexpr, kernel: tl.constexpr, average: tl.constexpr
):
    """With share j of a block's, where it is one of the `kernel` around this place."""
    if j >= place and j < place + kernel:
        pooled = pooled + share if average else tl.maximum(pooled, share)
    return pooled


@triton.jit
def _join(joined, pooled, group: tl.constexpr):  # type: ignore[no-untyped-def]
    """With one more head of the group."""
    return tl.maximum(joined, pooled) if group == "max" else joined + pooled


@triton.jit
def _count_all(histogram, digits, others):  # type: ignore[no-untyped-def]
    """Count digits; so many others were counted as 0, and are taken off again."""
    count = tl.histogram(digits, 256)
    value = tl.arange(0, 256)
    count -= tl.where(value == 0, others, 0)
    tl.atomic_add(histogram + value, count, mask=count > 0, sem="relaxed")


@triton.jit
def _search(x, bases, pivots, sizes, rows, steps):  # type: ignore[no-untyped-def]
    """Row of scores in which search x looks, and how many it wants: a reference's, then a satellite's."""
    of_satellite = x >= rows
    pivot = tl.load(pivots + x - rows, mask=of_satellite, other=0).to(tl.int32)
    row = tl.where(of_satellite, pivot * steps + steps - 1, x)
    size = tl.load(sizes + x - rows, mask=of_satellite, other=0)
    base = tl.load(bases + x // steps, mask=x < rows, other=0)
    return row, tl.where(of_satellite, size, base).to(tl.int32)


@triton.jit
def _bits(scores, row, n, width):  # type: ignore[no-untyped-def]
    """Scores as integers of the same order; negative behind the prompt."""
    score = tl.load(scores + row.to(tl.int64) * width + n, mask=n < width, other=-1.0)
    return score.to(tl.int32, bitcast=True)


@triton.jit
def _narrow(histograms, states, x, row, want, digits: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first digits of the `want`-th largest number, and its place among those that have them.

    From what was known of one digit less, and the count of the last one. The first program of a search keeps
    it for the next launch.
    """
    prefix = tl.full([], 0, tl.int32)
    place = want
    counted = x
    if digits == 1:
        # Of the row, whose scores are the same for all who search them.
        counted = row
    else:
        prefix = tl.load(states + (x * 4 + digits - 2) * 2)
        place = tl.load(states + (x * 4 + digits - 2) * 2 + 1)
    value = tl.arange(0, 256)
    count = tl.load(histograms + counted * 1024 + (digits - 1) * 256 + value)
    upward = tl.sum(count, 0) - tl.cumsum(count, 0)
    chosen = tl.maximum(tl.sum((upward + count >= place).to(tl.int32), 0) - 1, 0)
    place -= tl.sum(tl.where(value == chosen, upward, 0), 0)
    prefix = (prefix << 8) | chosen
    if tl.program_id(0) == 0:
        tl.store(states + (x * 4 + digits - 1) * 2, prefix)
        tl.store(states + (x * 4 + digits - 1) * 2 + 1, place)
    return prefix, place


@triton.jit
def _threshold(prefix):  # type: ignore[no-untyped-def]
    """The number that has these four digits: its sign is none of them, and the last bit is empty."""
    return (prefix.to(tl.uint32, bitcast=True) >> 1).to(tl.int32, bitcast=True)


@triton.jit
def _count_digits(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, states, rows, steps, width, histograms, full, digit: tl.constexpr,
    sparse: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Count the values of a digit among the numbers that share the digits before it with the wanted one."""
    x = tl.program_id(1)
    row, want = _search(x, bases, pivots, sizes, rows, steps)
    if tl.load(full + row // steps) == 0:
        return
    bits = _bits(scores, row, tl.program_id(0) * chunk + tl.arange(0, chunk), width)
    prefix, _ = _narrow(histograms, states, x, row, want, digit)
    number = (bits << 1).to(tl.uint32, bitcast=True)
    live = (bits >= 0) & ((number >> (32 - 8 * digit)) == prefix.to(tl.uint32, bitcast=True))
    value = ((number >> (24 - 8 * digit)) & 255).to(tl.int32)
    histogram = histograms + x * 1024 + digit * 256
    alive = tl.sum(live.to(tl.int32), 0)
    if alive > sparse:
        _count_all(histogram, tl.where(live, value, 0), chunk - alive)
    elif alive > 0:
        tl.atomic_add(histogram + value, 1, mask=live, sem="relaxed")


@triton.jit
def _count_found(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, states, rows, steps, width, histograms, full, found, reference, chunks,
    chunk: tl.constexpr,
):  # fmt: skip
    """How many numbers of a chunk are above the threshold, and how many are it; then those of each that the
    reference has.
    """
    x = tl.program_id(1)
    row, want = _search(x, bases, pivots, sizes, rows, steps)
    p = row // steps
    if tl.load(full + p) == 0:
        return
    n = tl.program_id(0) * chunk + tl.arange(0, chunk)
    bits = _bits(scores, row, n, width)
    wanted = (n < width) & (x < rows)
    known = tl.load(reference + p.to(tl.int64) * width + n, mask=wanted, other=0) != 0
    prefix, _ = _narrow(histograms, states, x, row, want, 4)
    threshold = _threshold(prefix)
    above, equal = bits > threshold, bits == threshold
    # A chunk has fewer than 2**15 numbers: two counts in halves of a word.
    both = tl.sum(above.to(tl.int32) | (equal.to(tl.int32) << 16), 0)
    both_known = tl.sum((above & known).to(tl.int32) | ((equal & known).to(tl.int32) << 16), 0)
    found += x * 4 * chunks + tl.program_id(0)
    tl.store(found, both & 0xFFFF)
    tl.store(found + chunks, both >> 16)
    tl.store(found + 2 * chunks, both_known & 0xFFFF)
    tl.store(found + 3 * chunks, both_known >> 16)


@triton.jit
def _overlap(  # type: ignore[no-untyped-def]
    scores, states, width, found, reference, p, x, chunks, chunks_pad: tl.constexpr, chunk: tl.constexpr
):
    """How many of the positions that the query of search x wants the reference has."""
    threshold = _threshold(tl.load(states + (x * 4 + 3) * 2))
    ties = tl.load(states + (x * 4 + 3) * 2 + 1)
    c = tl.arange(0, chunks_pad)
    found += x * 4 * chunks
    equal_C = tl.load(found + chunks + c, mask=c < chunks, other=0)
    above_known_C = tl.load(found + 2 * chunks + c, mask=c < chunks, other=0)
    equal_known_C = tl.load(found + 3 * chunks + c, mask=c < chunks, other=0)
    upto_C = tl.cumsum(equal_C, 0)
    hits = tl.sum(above_known_C + tl.where(upto_C <= ties, equal_known_C, 0), 0)
    cut_C = (upto_C > ties) & (upto_C - equal_C < ties)
    left = ties - tl.sum(tl.where(cut_C, upto_C - equal_C, 0), 0)
    if tl.sum(cut_C.to(tl.int32), 0) > 0:
        # The chunk of which some ties are wanted: the earliest.
        n = tl.sum(tl.where(cut_C, c, 0), 0) * chunk + tl.arange(0, chunk)
        equal = (_bits(scores, x, n, width) == threshold).to(tl.int32)
        known = tl.load(reference + p.to(tl.int64) * width + n, mask=n < width, other=0) != 0
        hits += tl.sum(tl.where(known & (tl.cumsum(equal, 0) <= left), equal, 0), 0)
    return hits


@triton.jit
def _decide(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, states, rows, steps, width, found, reference, full, windows, triggers,
    drifts, threshold, chunks, chunks_pad: tl.constexpr, steps_pad: tl.constexpr, every: tl.constexpr,
    chunk: tl.constexpr,
):  # fmt: skip
    """Whether pivot p has drifted; the median of an even number is the mean of the middle two."""
    p = tl.program_id(0)
    tl.store(drifts + p, 0)
    if tl.load(full + p) == 0:
        return
    tl.store(full + p, p < 0)
    window = tl.load(windows + p) + 1
    tl.store(windows + p, window)
    w = tl.arange(0, steps_pad)
    count = tl.zeros([steps_pad], tl.float32)
    for step in range(steps):
        x = p * steps + step
        hits = _overlap(scores, states, width, found, reference, p, x, chunks, chunks_pad, chunk)
        count = tl.where(w == step, hits.to(tl.float32), count)
    if every > 0:
        drifted = window % every == 0
    elif every == 0:
        drifted = steps < 0
    else:
        base = tl.load(bases + p).to(tl.float32)
        # Rounded as torch does: a share of one half is not below a threshold of one half.
        share = tl.where(w < steps, tl.div_rn(count, tl.zeros_like(count) + base), float("inf"))
        ahead = (share[None, :] < share[:, None]) | (
            (share[None, :] == share[:, None]) & (w[None, :] < w[:, None])
        )
        rank = tl.sum(ahead.to(tl.int32), 1)
        middle = tl.sum(tl.where(rank == (steps - 1) // 2, share, 0.0), 0)
        last = tl.sum(tl.where(rank == steps // 2, share, 0.0), 0)
        drifted = (middle + last) * 0.5 < threshold
    if drifted:
        tl.store(drifts + p, 1)
        tl.store(triggers + p, tl.load(triggers + p) + 1)


@triton.jit
def _members(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, states, rows, steps, width, found, x, n, chunks, chunks_pad: tl.constexpr
):
    """Whether positions n (a chunk) are among those wanted, and their places among them."""
    row, want = _search(x, bases, pivots, sizes, rows, steps)
    threshold = _threshold(tl.load(states + (x * 4 + 3) * 2))
    ties = tl.load(states + (x * 4 + 3) * 2 + 1)
    c = tl.arange(0, chunks_pad)
    earlier = c < tl.program_id(0)
    found += x * 4 * chunks
    above_before = tl.sum(tl.load(found + c, mask=earlier, other=0), 0)
    equal_before = tl.sum(tl.load(found + chunks + c, mask=earlier, other=0), 0)
    bits = _bits(scores, row, n, width)
    equal = (bits == threshold).to(tl.int32)
    tie = equal_before + tl.cumsum(equal, 0) - equal
    member = (want > 0) & ((bits > threshold) | ((equal != 0) & (tie < ties)))
    one = member.to(tl.int32)
    return member, above_before + tl.minimum(equal_before, ties) + tl.cumsum(one, 0) - one


@triton.jit
def _renew(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, states, rows, steps, width, found, reference, drifts, chosen, fresh, coming,
    pivot_count, room, chunks, chunks_pad: tl.constexpr, staged: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """A chunk of a pivot's new reference, or the positions in it that a satellite takes."""
    y = tl.program_id(1)
    q = y - pivot_count
    of_satellite = y >= pivot_count
    p = tl.where(of_satellite, tl.load(pivots + q, mask=of_satellite, other=0).to(tl.int32), y)
    drifted = tl.load(drifts + p) != 0
    if (tl.program_id(0) == 0) & of_satellite:
        count = tl.where(drifted, tl.load(sizes + q), 0)
        tl.store(fresh + q, count)
        if staged:
            tl.store(coming + q, count > 0, mask=count > 0)
    if drifted:
        n = tl.program_id(0) * chunk + tl.arange(0, chunk)
        x = tl.where(of_satellite, rows + q, p * steps + steps - 1)
        member, place = _members(
            scores, bases, pivots, sizes, states, rows, steps, width, found, x, n, chunks, chunks_pad
        )
        if of_satellite:
            tl.store(chosen + q.to(tl.int64) * room + place, n, mask=member)
        else:
            tl.store(reference + p.to(tl.int64) * width + n, member, mask=n < width)
