"""Splits of a token budget over heads and layers. Every split gives whole tokens whose sum is exact."""

from __future__ import annotations

import math


def round_to_sum(shares: list[float], total: int, caps: list[int]) -> list[int]:
    """Largest remainder: whole numbers near `shares`, each at most its cap, that add up to `total`.

    Raises:
        ValueError: the caps don't admit the total.
    """
    if sum(caps) < total:
        raise ValueError(f"cannot place {total} tokens under caps that add up to {sum(caps)}")
    whole = [min(math.floor(share), cap) for share, cap in zip(shares, caps, strict=True)]
    missing = total - sum(whole)
    by_remainder = sorted(range(len(shares)), key=lambda i: whole[i] - shares[i])
    while missing:
        open_shares = [i for i in by_remainder if whole[i] < caps[i]]
        for i in open_shares[:missing]:
            whole[i] += 1
        missing = total - sum(whole)
    return whole


def water_fill(weights: list[float], total: int, cap: int) -> list[int]:
    """Tokens in proportion to `weights`, at most `cap` each, the clipped surplus going to the others.

    The sum is min(total, cap * len(weights)) exactly. All weights must be positive.
    """
    total = min(total, cap * len(weights))
    shares = [0.0] * len(weights)
    open_, left = set(range(len(weights))), float(total)
    while open_:
        level = left / sum(weights[i] for i in open_)
        full = {i for i in open_ if level * weights[i] >= cap}
        if not full:
            shares = [level * weights[i] if i in open_ else share for i, share in enumerate(shares)]
            break
        shares = [float(cap) if i in full else share for i, share in enumerate(shares)]
        open_ -= full
        left -= cap * len(full)
    return round_to_sum(shares, total, [cap] * len(weights))
