"""Files of others that RULER's tasks are made from: which task needs which, and each read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hcache.benchmarks.ruler_tasks import NEEDLE_TASKS
from hcache.benchmarks.ruler_words import (
    Essays,
    QuestionSet,
    english_words,
    essay_words,
    hotpotqa,
    sentence_splitter,
    split_at_stops,
    squad,
)


@dataclass(frozen=True)
class Asset:
    """A file of others that tasks are made from.

    Args:
        names: it may have, in `data_dir`.
        what: it is.
    """

    names: tuple[str, ...]
    what: str


ESSAYS = Asset(
    ("PaulGrahamEssays.json", "PaulGrahamEssays.txt"), 'Paul Graham\'s essays ({"text": ...}, or plain text)'
)
SQUAD = Asset(("dev-v2.0.json",), "SQuAD 2.0's development set")
HOTPOTQA = Asset(
    ("hotpot_dev_distractor_v1.json", "hotpotqa.json"), "HotpotQA's development set with distractors"
)
ENGLISH = Asset(("english_words.json",), "RULER's list of English words")


class Assets:
    """The tasks' files, each read when it is first needed, and once.

    Args:
        paths: where they lie.
    """

    def __init__(self, paths: Mapping[Asset, Path]) -> None:
        self._paths = paths
        self._essay_words: list[str] = []

    def essays(self) -> Essays:
        """Of the essays' words, cut into sentences by nltk, or by rule where it can't."""
        self._essay_words = self._essay_words or essay_words(self._paths[ESSAYS])
        return Essays(self._essay_words, sentence_splitter() or split_at_stops)

    def english_words(self) -> list[str] | None:
        """None where the list isn't there."""
        return english_words(self._paths[ENGLISH]) if ENGLISH in self._paths else None

    def questions(self, task: str) -> QuestionSet:
        """Of qa_1, or qa_2."""
        return squad(self._paths[SQUAD]) if task == "qa_1" else hotpotqa(self._paths[HOTPOTQA])


def assets_of(task: str) -> tuple[Asset, ...]:
    """The files that a task can use."""
    if task in NEEDLE_TASKS:
        return (ESSAYS,) if NEEDLE_TASKS[task].haystack == "essay" else ()
    return {"qa_1": (SQUAD,), "qa_2": (HOTPOTQA,), "cwe": (ENGLISH,)}.get(task, ())


def where(asset: Asset) -> str:
    """What to do about a file that isn't there."""
    return f"put {' or '.join(asset.names)} into benchmark.data_dir (or data/ruler/)"
