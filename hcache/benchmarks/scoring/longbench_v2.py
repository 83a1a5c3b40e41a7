"""LongBench v2: which letter a reply chooses, by the rules behind published scores.

`official` (THUDM/LongBench 2e00731, pred.py): without asterisks, the letter in brackets after the sentence
that the prompt asks for, else the capital that follows that sentence, even as the first letter of a word.
`heterocache` (ponytaill/HeteroCache 01dc7fe): where that finds none, a letter in braces, then one in
brackets, then one that stands alone, an article included. `kvpress` (NVIDIA/kvpress 8bb29b9) looks for no
letter: a reply with the right one anywhere in it is right. All tell capitals from small letters and take the
first hit.
"""

from __future__ import annotations

import re

from hcache.registry import unknown_name

LETTERS = ("A", "B", "C", "D")
SUBSTRING = "kvpress"
_OFFICIAL = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")
_CHAINS = {
    "official": _OFFICIAL,
    "heterocache": (*_OFFICIAL, r"\{([A-D])\}", r"\(([A-D])\)", r"\b([A-D])\b"),
}
EXTRACTIONS = (*_CHAINS, SUBSTRING)
_THOUGHT = "</think>"


def check_extraction(extraction: str) -> None:
    """Raise ValueError for an extraction that is not known."""
    if extraction not in EXTRACTIONS:
        raise ValueError(f"benchmark 'longbench_v2': {unknown_name('extraction', extraction, EXTRACTIONS)}")


def extract(reply: str, extraction: str = "official", model_family: str | None = None) -> str | None:
    """The letter that a reply chooses, None if it chooses none.

    Args:
        extraction: official or heterocache.
        model_family: heterocache reads "deepseek" after its thoughts, and as (A) if these don't end.

    Raises:
        ValueError: another extraction; kvpress' rule finds no letter.
    """
    if extraction not in _CHAINS:
        raise ValueError(f"benchmark 'longbench_v2': {unknown_name('extraction', extraction, _CHAINS)}")
    if extraction == "heterocache" and "deepseek" in (model_family or "").lower():
        reply = reply.rpartition(_THOUGHT)[2] if _THOUGHT in reply else "(A)"
    reply = reply.replace("*", "")
    for pattern in _CHAINS[extraction]:
        found = re.search(pattern, reply)
        if found is not None:
            return found[1]
    return None


def score(reply: str, right: str, extraction: str = "official", model_family: str | None = None) -> float:
    """1 if a reply chooses the right letter, else 0.

    Raises:
        ValueError: an unknown extraction, or a right answer that is no letter of the four.
    """
    check_extraction(extraction)
    if right not in LETTERS:
        raise ValueError(f"benchmark 'longbench_v2': the answer is one of {list(LETTERS)}, got {right!r}")
    if extraction == SUBSTRING:
        return float(right in reply)
    return float(extract(reply, extraction, model_family) == right)


def answered(reply: str, extraction: str = "official", model_family: str | None = None) -> bool:
    """Whether a reply can be right at all: it chooses a letter, or contains one where that is the rule."""
    check_extraction(extraction)
    if extraction == SUBSTRING:
        return any(letter in reply for letter in LETTERS)
    return extract(reply, extraction, model_family) is not None
