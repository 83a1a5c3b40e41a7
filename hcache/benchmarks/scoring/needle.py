"""How much of a needle is in a response: the two scores in use, 0 to 1.

Pure functions of texts. Knows no prompt, no length and no depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any


def recall(response: str, expected: str) -> float:
    """Share of the expected answer's different words that the response has.

    Words are what white space separates, in lower case, punctuation included: `piano` is not `piano.`.

    Raises:
        ValueError: no word is expected.
    """
    words = set(expected.lower().split())
    if not words:
        raise ValueError("recall needs an expected answer of at least one word")
    return len(words & set(response.lower().split())) / len(words)


def rouge1(response: str, expected: str) -> float:
    """ROUGE-1 F of the response against the expected text, with the Porter stemmer (`rouge_score`)."""
    return float(_rouge().score(expected, response)["rouge1"].fmeasure)


SCORES: dict[str, Callable[[str, str], float]] = {"recall": recall, "rouge1": rouge1}
"""By name: functions of the response and of what is expected."""


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk

    return RougeScorer(["rouge1"], use_stemmer=True)
