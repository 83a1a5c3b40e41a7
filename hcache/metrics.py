"""Scores of answers, and what a set of scores can support: intervals and paired comparisons.

Pure functions of their arguments; random draws come from a seed. Knows no benchmark and no record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 4_000_000  # indices drawn at a time


def exact_match(said: Sequence[str], right: Sequence[str]) -> float:
    """Share of places, 0 to 1, where what was said is exactly right.

    Raises:
        ValueError: lists of unequal length, or empty ones.
    """
    if not right or len(said) != len(right):
        raise ValueError(f"exact_match compares answers one by one; got {len(said)} for {len(right)}")
    return sum(s == r for s, r in zip(said, right, strict=True)) / len(right)


@dataclass(frozen=True)
class Comparison:
    """A paired difference of means, its interval, and how often chance alone would bring one as large."""

    difference: float
    ci: tuple[float, float]
    p_value: float


Tree = Sequence[Any]
"""Scores, or trees: its mean is that of its scores, or of its trees' means."""


def tree_mean(tree: Tree) -> float:
    """The mean of means of a tree. Raises ValueError for an empty one."""
    if not tree:
        raise ValueError("there is no score to average")
    return math.fsum(part if isinstance(part, int | float) else tree_mean(part) for part in tree) / len(tree)


def tree_size(tree: Tree) -> int:
    """Scores in a tree."""
    return sum(1 if isinstance(part, int | float) else tree_size(part) for part in tree)


def tree_ci(tree: Tree, seed: int, level: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap interval of `tree_mean`: every list of scores is resampled for itself.

    Raises:
        ValueError: as bootstrap_ci, and for an empty tree.
    """
    if not tree:
        raise ValueError("there is no score to average")
    return _interval(_tree_means(tree, np.random.default_rng(seed), draws), level)


def _tree_means(tree: Tree, rng: np.random.Generator, draws: int) -> NDArray[np.float64]:
    if isinstance(tree[0], int | float):
        array = _checked(tree)
        shapes = [(rows, array.size) for rows in _blocks(array.size, draws)]
        return np.concatenate([array[rng.integers(0, array.size, shape)].mean(axis=1) for shape in shapes])
    return np.stack([_tree_means(part, rng, draws) for part in tree]).mean(axis=0)


def wilson(score: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a mean of n scores in [0, 1] (Wilson, JASA 1927).

    Exact-match scores are 0 or 1 and it is the binomial interval; a score in between varies less than that
    (variance <= p(1-p)), so the interval is on the safe side, and it is never empty at 0 or 1.
    """
    centre = (score + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(score * (1 - score) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound is the score itself, but for rounding.
    return min(score, max(0.0, centre - half)), max(score, min(1.0, centre + half))


def mean_interval(scores: Sequence[float], intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """95% interval of the plain mean of independent scores, from the interval of each, on their scale.

    The method of variance estimates recovery (Zou and Donner, Stat. Med. 27, 2008, eq. 3, for a sum): what
    each interval gives its own bound is added up in squares. Of Wilson's intervals it is never empty.

    Raises:
        ValueError: no scores, or another number of intervals.
    """
    if not scores or len(scores) != len(intervals):
        raise ValueError(f"each score needs its interval; got {len(scores)} and {len(intervals)}")
    pairs = list(zip(scores, intervals, strict=True))
    mean = math.fsum(scores) / len(scores)
    below = math.hypot(*(score - low for score, (low, _) in pairs)) / len(scores)
    above = math.hypot(*(high - score for score, (_, high) in pairs)) / len(scores)
    return mean - below, mean + above


def bootstrap_ci(
    values: Sequence[float], seed: int, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979); the same seed gives the same interval.

    Raises:
        ValueError: no values, a level outside (0, 1), or fewer than 1 draw.
    """
    return _interval(_bootstrap_means(_checked(values), seed, draws), level)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int, level: float = 0.95, draws: int = 10_000
) -> Comparison:
    """Mean of a - b over the same examples, with its bootstrap interval and a two-sided p-value.

    The p-value is the share of sign-flipped resamplings (each pair kept or swapped by a fair coin, which is
    exact if the two are alike) whose mean is at least as far from 0, with one added to both counts.

    Args:
        a, b: scores, entry i of both on the same example.

    Raises:
        ValueError: unequal lengths, no values, a level outside (0, 1), or fewer than 1 draw.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired comparison needs the same examples; got {len(a)} and {len(b)} scores")
    gaps = _checked(a) - _checked(b)
    means = _bootstrap_means(gaps, seed, draws)
    return Comparison(float(gaps.mean()), _interval(means, level), _flip_p_value(gaps, seed, draws))


def _checked(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"needs a list of one or more scores; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("scores must be finite numbers")
    return array


def _blocks(size: int, draws: int) -> list[int]:
    """Draws in blocks that fit in memory."""
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1")
    block = max(1, _BLOCK // size)
    return [min(block, draws - done) for done in range(0, draws, block)]


def _bootstrap_means(array: NDArray[np.float64], seed: int, draws: int) -> NDArray[np.float64]:
    """Means [draws] of resamples with replacement."""
    return _tree_means(array.tolist(), np.random.default_rng(seed), draws)


def _flip_p_value(gaps: NDArray[np.float64], seed: int, draws: int) -> float:
    rng = np.random.default_rng((seed, 1))
    observed = abs(gaps.sum()) - 1e-12 * max(
        1.0, np.abs(gaps).sum()
    )  # sums in another order differ by rounding
    extreme = 0
    for rows in _blocks(gaps.size, draws):
        signs = rng.integers(0, 2, (rows, gaps.size), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ gaps) >= observed).sum())
    return (extreme + 1) / (draws + 1)


def _interval(means: NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1")
    tail = (1 - level) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)
