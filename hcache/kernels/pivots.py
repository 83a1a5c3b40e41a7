"""HeteroCache's pivots: their queries are collected, and their prompts searched for what is looked at now.

The largest `count` scores of a row are found without sorting it: digit by digit of their bits, histograms
tell how many scores are above, until the threshold is known exactly, and how many of those equal to it belong
to the largest (the earliest ones). Every launch spreads a row over many programs, so that long prompts take
no longer than the device needs to read them.

Shapes: S segments, P pivots, W queries of a window, G query heads of a pivot, D head dim, N room for prompt
tokens, Q satellites, K room for the tokens of one; X = P*W + Q searches (the window's queries of each pivot
for its reference, then each satellite's in the latest query's scores), C chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Scores of a row that a program searches."""

SMOOTHED = 1024
"""Scores that a program makes; each takes G * kernel logits."""

DIGITS = 4
BINS = 256
HISTOGRAMS = DIGITS * BINS
"""A float32 is so many digits of so many values; a search counts the values of each."""

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
    tokens_P: Tensor,
    base_P: Tensor,
    pivot_Q: Tensor,
    sizes_Q: Tensor,
    full_P: Tensor,
    reference_PN: Tensor,
    chosen_QK: Tensor,
    windows_P: Tensor,
    triggers_P: Tensor,
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
        logits_PWGN: float32, -inf behind a prompt.
        tokens_P, base_P: [P] int64, prompt tokens, and size of a reference (1 to tokens).
        pivot_Q, sizes_Q: [Q] int64, each satellite's pivot, and tokens that it holds (0 to tokens - 1).
        full_P: [P] bool, pivots to decide about.
        reference_PN: bool, renewed in place.
        chosen_QK: int32, renewed in place; what is behind a satellite's own stays.
        windows_P, triggers_P: [P] int64; grow by 1 with a full window, and with a drift.
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
    assert logits_PWGN.is_contiguous()
    scores = smooth(logits_PWGN, tokens_P, kernel=kernel, average=average, group=group)
    # Histograms of each search, and the overlap of each row: one buffer of zeros.
    counters = torch.zeros(searches * HISTOGRAMS + rows, dtype=torch.int32, device=scores.device)
    overlaps, found = counters[searches * HISTOGRAMS :], counters.new_empty(searches, chunks, 2)
    search = (scores, base_P, pivot_Q, sizes_Q, counters, rows, steps, width)
    for digit in range(DIGITS):
        _count_digits[(chunks, searches)](*search, digit, CHUNK, num_warps=8)
    _count_found[(chunks, searches)](*search, found, chunks, CHUNK, num_warps=8)
    pad = triton.next_power_of_2(chunks)
    _overlap[(chunks, rows)](
        *search, found, reference_PN, overlaps, full_P, windows_P, chunks, pad, CHUNK, num_warps=8
    )
    fresh_Q = torch.empty_like(sizes_Q)
    _renew[(chunks, pivots + satellites)](
        *search, found, reference_PN, overlaps, full_P, windows_P, triggers_P, chosen_QK, fresh_Q,
        threshold, pivots, room, chunks, pad, triton.next_power_of_2(steps),
        BY_OVERLAP if every is None else every, CHUNK, num_warps=8,
    )  # fmt: skip
    return fresh_Q


def smooth(logits_PWGN: Tensor, tokens_P: Tensor, *, kernel: int, average: bool, group: str) -> Tensor:
    """Scores [P, W, N]: softmax, pooled over neighbours, joined over the group; -1 behind a prompt."""
    pivots, steps, heads, width = logits_PWGN.shape
    rows, chunks = pivots * steps, triton.cdiv(width, CHUNK)
    parts = logits_PWGN.new_empty(2, rows * heads, chunks)
    _partials[(chunks, rows * heads)](logits_PWGN, parts[0], parts[1], width, chunks, CHUNK, num_warps=8)
    scores = logits_PWGN.new_empty(pivots, steps, width)
    _smooth[(triton.cdiv(width, SMOOTHED), rows)](
        logits_PWGN, parts[0], parts[1], tokens_P, scores, width, steps, chunks,
        triton.next_power_of_2(chunks), heads, kernel, average, group, SMOOTHED, num_warps=4,
    )  # fmt: skip
    return scores


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
def _partials(logits, peaks, totals, width, chunks, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum, and sum of exponentials below it, of a chunk of a row."""
    c = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    n = c * chunk + tl.arange(0, chunk)
    logit = tl.load(logits + r * width + n, mask=n < width, other=float("-inf"))
    peak = tl.max(logit, 0)
    # A chunk behind the prompt: exp(-inf - 0) = 0 rather than NaN.
    total = tl.sum(tl.exp(logit - tl.where(peak == float("-inf"), 0.0, peak)), 0)
    tl.store(peaks + r * chunks + c, peak)
    tl.store(totals + r * chunks + c, total)


@triton.jit
def _smooth(  # type: ignore[no-untyped-def]
    logits, peaks, totals, tokens, scores, width, steps, chunks, chunks_pad: tl.constexpr,
    heads: tl.constexpr, kernel: tl.constexpr, average: tl.constexpr, group: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """A block of scores of a row, from the logits of its G heads."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * block + tl.arange(0, block)
    c = tl.arange(0, chunks_pad)
    joined = tl.zeros([block], tl.float32)
    for g in range(heads):
        r = row * heads + g
        peak_C = tl.load(peaks + r * chunks + c, mask=c < chunks, other=float("-inf"))
        total_C = tl.load(totals + r * chunks + c, mask=c < chunks, other=0.0)
        peak = tl.max(peak_C, 0)
        total = tl.sum(total_C * tl.exp(peak_C - peak), 0)
        pooled = tl.zeros([block], tl.float32)
        for j in tl.static_range(kernel):
            m = n + (j - kernel // 2)
            logit = tl.load(logits + r * width + m, mask=(m >= 0) & (m < width), other=float("-inf"))
            share = tl.exp(logit - peak) / total
            pooled = pooled + share if average else tl.maximum(pooled, share)
        if average:
            pooled = pooled / kernel
        joined = tl.maximum(joined, pooled) if group == "max" else joined + pooled
    if group == "mean":
        joined = joined / heads
    live = n < tl.load(tokens + row // steps)
    tl.store(scores + row * width + n, tl.where(live, joined, -1.0), mask=n < width)


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
def _threshold(histograms, want, digits: tl.constexpr):  # type: ignore[no-untyped-def]
    """First digits (each of BINS values) of the `want`-th largest number, and its place among those that
    have them.
    """
    value = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.int32)
    place = want
    for digit in tl.static_range(digits):
        count = tl.load(histograms + digit * 256 + value)
        upward = tl.sum(count, 0) - tl.cumsum(count, 0)
        chosen = tl.maximum(tl.sum((upward + count >= place).to(tl.int32), 0) - 1, 0)
        place -= tl.sum(tl.where(value == chosen, upward, 0), 0)
        prefix = (prefix << 8) | chosen
    return prefix, place


@triton.jit
def _count_digits(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, histograms, rows, steps, width, digit: tl.constexpr, chunk: tl.constexpr
):
    """Count the values of a digit among the numbers that share the digits before it with the wanted one."""
    x = tl.program_id(1)
    row, want = _search(x, bases, pivots, sizes, rows, steps)
    histograms += x * 1024
    prefix, _ = _threshold(histograms, want, digit)
    bits = _bits(scores, row, tl.program_id(0) * chunk + tl.arange(0, chunk), width)
    live = bits >= 0
    shift: tl.constexpr = 24 - 8 * digit
    if digit > 0:
        live = live & ((bits >> (shift + 8)) == prefix)
    # Others are counted as 0 and taken off again.
    count = tl.histogram(tl.where(live, (bits >> shift) & 255, 0), 256)
    value = tl.arange(0, 256)
    count -= tl.where(value == 0, tl.sum((~live).to(tl.int32), 0), 0)
    tl.atomic_add(histograms + digit * 256 + value, count, mask=count > 0)


@triton.jit
def _count_found(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, histograms, rows, steps, width, found, chunks, chunk: tl.constexpr
):
    """How many numbers of a chunk are above the threshold, and how many are it."""
    x = tl.program_id(1)
    row, want = _search(x, bases, pivots, sizes, rows, steps)
    threshold, _ = _threshold(histograms + x * 1024, want, 4)
    bits = _bits(scores, row, tl.program_id(0) * chunk + tl.arange(0, chunk), width)
    found += (x * chunks + tl.program_id(0)) * 2
    tl.store(found, tl.sum((bits > threshold).to(tl.int32), 0))
    tl.store(found + 1, tl.sum((bits == threshold).to(tl.int32), 0))


@triton.jit
def _members(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, histograms, rows, steps, width, found, x, n, chunks,
    chunks_pad: tl.constexpr,
):  # fmt: skip
    """Whether positions n (a chunk) are among those wanted, and their places among them."""
    row, want = _search(x, bases, pivots, sizes, rows, steps)
    threshold, ties = _threshold(histograms + x * 1024, want, 4)
    c = tl.arange(0, chunks_pad)
    earlier = c < tl.program_id(0)
    above_before = tl.sum(tl.load(found + (x * chunks + c) * 2, mask=earlier, other=0), 0)
    equal_before = tl.sum(tl.load(found + (x * chunks + c) * 2 + 1, mask=earlier, other=0), 0)
    bits = _bits(scores, row, n, width)
    equal = (bits == threshold).to(tl.int32)
    tie = equal_before + tl.cumsum(equal, 0) - equal
    member = (want > 0) & ((bits > threshold) | ((equal != 0) & (tie < ties)))
    one = member.to(tl.int32)
    return member, above_before + tl.minimum(equal_before, ties) + tl.cumsum(one, 0) - one


@triton.jit
def _overlap(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, histograms, rows, steps, width, found, reference, overlaps, full, windows,
    chunks, chunks_pad: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Positions of a chunk that a query wants and the reference has; the first programs count windows."""
    x = tl.program_id(1)
    n = tl.program_id(0) * chunk + tl.arange(0, chunk)
    member, _ = _members(
        scores, bases, pivots, sizes, histograms, rows, steps, width, found, x, n, chunks, chunks_pad
    )
    p = x // steps
    known = tl.load(reference + p.to(tl.int64) * width + n, mask=n < width, other=0) != 0
    tl.atomic_add(overlaps + x, tl.sum((member & known).to(tl.int32), 0))
    if (tl.program_id(0) == 0) & (x % steps == 0):
        tl.store(windows + p, tl.load(windows + p) + (tl.load(full + p) != 0).to(tl.int64))


@triton.jit
def _drifted(  # type: ignore[no-untyped-def]
    p, overlaps, bases, full, windows, threshold, steps, steps_pad: tl.constexpr, every: tl.constexpr
):
    """Whether pivot p has drifted; the median of an even number is the mean of the middle two."""
    drifted = tl.load(full + p) != 0
    if every > 0:
        drifted = drifted & (tl.load(windows + p) % every == 0)
    elif every == 0:
        drifted = drifted & (steps < 0)
    else:
        w = tl.arange(0, steps_pad)
        count = tl.load(overlaps + p * steps + w, mask=w < steps, other=0).to(tl.float32)
        base = tl.load(bases + p).to(tl.float32)
        # Rounded as torch does: a share of one half is not below a threshold of one half.
        share = tl.where(w < steps, tl.div_rn(count, tl.zeros_like(count) + base), float("inf"))
        ahead = (share[None, :] < share[:, None]) | (
            (share[None, :] == share[:, None]) & (w[None, :] < w[:, None])
        )
        rank = tl.sum(ahead.to(tl.int32), 1)
        middle = tl.sum(tl.where(rank == (steps - 1) // 2, share, 0.0), 0)
        last = tl.sum(tl.where(rank == steps // 2, share, 0.0), 0)
        drifted = drifted & ((middle + last) * 0.5 < threshold)
    return drifted


@triton.jit
def _renew(  # type: ignore[no-untyped-def]
    scores, bases, pivots, sizes, histograms, rows, steps, width, found, reference, overlaps, full, windows,
    triggers, chosen, fresh, threshold, pivot_count, room, chunks, chunks_pad: tl.constexpr,
    steps_pad: tl.constexpr, every: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """A chunk of a pivot's new reference, or the positions in it that a satellite takes."""
    y = tl.program_id(1)
    q = y - pivot_count
    of_satellite = y >= pivot_count
    p = tl.where(of_satellite, tl.load(pivots + q, mask=of_satellite, other=0).to(tl.int32), y)
    drifted = _drifted(p, overlaps, bases, full, windows, threshold, steps, steps_pad, every)
    if tl.program_id(0) == 0:
        if of_satellite:
            tl.store(fresh + q, tl.where(drifted, tl.load(sizes + q), 0))
        else:
            tl.store(triggers + p, tl.load(triggers + p) + drifted.to(tl.int64))
    if drifted:
        n = tl.program_id(0) * chunk + tl.arange(0, chunk)
        x = tl.where(of_satellite, rows + q, p * steps + steps - 1)
        member, place = _members(
            scores, bases, pivots, sizes, histograms, rows, steps, width, found, x, n, chunks, chunks_pad
        )
        if of_satellite:
            tl.store(chosen + q.to(tl.int64) * room + place, n, mask=member)
        else:
            tl.store(reference + p.to(tl.int64) * width + n, member, mask=n < width)
