"""What two texts share as multisets, and which characters don't count: for all scores that are an F1.

The rules of THUDM/LongBench's `metrics.py`, which InfiniteBench took over.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")

# Punctuation that Chinese scores delete besides ASCII's, first and last of each range: fullwidth ASCII but
# for the full stop U+FF0E, halfwidth forms, CJK marks and brackets, dashes, quotes, dots. U+300A stays,
# though its closing partner U+300B goes.
_CHINESE_MARKS = (
    "2013-2014 2018-2019 201B-201F 2026-2027 3001-3003 300B-3011 3014-301F 3030-3030 303E-303F "
    "FE4F-FE4F FF01-FF0D FF0F-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF64"
)


def _codes(ranges: str) -> list[int]:
    ends = [[int(code, 16) for code in part.split("-")] for part in ranges.split()]
    return [code for first, last in ends for code in range(first, last + 1)]


_ENGLISH = dict.fromkeys(map(ord, string.punctuation))
_CHINESE = {**_ENGLISH, **dict.fromkeys(_codes(_CHINESE_MARKS))}


def f1(said: Sequence[str], right: Sequence[str]) -> float:
    """F1 of two multisets of words or characters; 0 where they share nothing."""
    shared = (Counter(said) & Counter(right)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(right)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words, without case, ASCII punctuation and articles."""
    return f1(_english_words(prediction), _english_words(answer))


def _english_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_ENGLISH)).split()


def bare_chinese(text: str) -> str:
    """A text without case, punctuation and space."""
    return "".join(text.lower().translate(_CHINESE).split())
