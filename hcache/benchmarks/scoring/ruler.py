"""RULER: how much of an answer's parts a prediction says (Hsieh et al., arXiv 2404.06654).

The rules of scripts/eval/synthetic/constants.py at c3f5e3b, for one prediction and on 0 to 1; the official
numbers are their means times 100, rounded to two places. A part counts wherever its text is in the
prediction, inside a longer word or number too, and however much else is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def preprocessed(prediction: str, control: str = "\n") -> str:
    """A prediction as it is compared: control characters, line breaks among them, replaced; no outer space.

    Args:
        control: what replaces each of them; kvpress takes them away ("").
    """
    return _CONTROL.sub(control, prediction).strip()


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that are in the prediction, in whatever case. Raises ValueError for no answer."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in _some(answers)) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 if any of the answers is in the prediction, in whatever case. Raises ValueError for no answer."""
    text = prediction.lower()
    return float(any(answer.lower() in text for answer in _some(answers)))


def _some(answers: Sequence[str]) -> Sequence[str]:
    if not answers:
        raise ValueError("benchmark 'ruler': there must be at least one answer to look for")
    return answers
