"""What RULER's texts are made of: word lists, essays, their sentences, and two sets of questions.

Word lists are wonderwords' (its version decides the samples, so it is pinned). Everything else is a file of
others that is read from where the user put it. Knows no task and no prompt.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple, overload

from hcache.benchmarks.source import DataError

Splitter = Callable[[str], list[str]]


class Pairs(Sequence[str]):
    """Every "first-second" of two word lists, each once and sorted, without holding millions of them.

    Pairs of one first word lie together and in the order of the second, unless one first word begins another
    ("high" and "high-pitched"): those few are sorted together.
    """

    def __init__(self, first: Iterable[str], second: Iterable[str]) -> None:
        self._second = sorted(set(second))
        heads = sorted(f"{word}-" for word in set(first))
        self._groups = [list(group) for _, group in groupby(heads, key=_family_of(heads))]
        self._mixed = {
            place: sorted({head + word for head in group for word in self._second})
            for place, group in enumerate(self._groups)
            if len(group) > 1
        }
        sizes = (len(self._mixed.get(place, self._second)) for place in range(len(self._groups)))
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        group = bisect_right(self._ends, place)
        within = place - (self._ends[group - 1] if group else 0)
        if group in self._mixed:
            return self._mixed[group][within]
        return self._groups[group][0] + self._second[within]


def _family_of(heads: Sequence[str]) -> Callable[[str], str]:
    """The shortest of the sorted `heads` that begins a head."""
    found: dict[str, str] = {}
    shortest = None
    for head in heads:
        if shortest is None or not head.startswith(shortest):
            shortest = head
        found[head] = shortest
    return found.__getitem__


def _list(name: str) -> list[str]:
    """A word list of wonderwords; its reader is private, but the pinned version has it."""
    from wonderwords import random_word

    words: list[str] = random_word._get_words_from_text_file(f"{name}list.txt")
    return words


@lru_cache(maxsize=1)
def adjective_nouns() -> Pairs:
    """Keys of needles: 6 million pairs."""
    return Pairs(_list("adjective"), _list("noun"))


@lru_cache(maxsize=1)
def plain_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, sorted, each once: 8166 with wonderwords 3.0.1."""
    return tuple(sorted({*_list("noun"), *_list("adjective"), *_list("verb")}))


# --- files


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is no JSON file ({error}); it may be cut short: get it again") from error


def english_words(path: Path) -> list[str]:
    """Words of RULER's english_words.json: an object whose values are words, or a list of words.

    Raises:
        DataError: it is something else.
    """
    found = _json(path)
    words = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{path} must hold a JSON list of words, or an object whose values are words")
    return list(dict.fromkeys(words))


def essay_words(path: Path) -> list[str]:
    """Words of the essays, in order: of a plain text, or of the "text" of a JSON object.

    Raises:
        DataError: JSON of another form, or no word.
    """
    text = _json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")
    if isinstance(text, dict):
        text = text.get("text")
    if not isinstance(text, str) or not text.split():
        raise DataError(f'{path} must hold the essays as {{"text": "..."}}, or as plain text in a .txt file')
    return text.split()


class Essays:
    """Running text of any number of words, cut into sentences.

    Args:
        words: of the whole corpus; it begins again at its end.
        split: cuts a text into sentences.
    """

    def __init__(self, words: Sequence[str], split: Splitter) -> None:
        self._words, self._split = words, split
        self._last: tuple[int, list[str]] = (0, [])

    def sentences(self, size: int) -> list[str]:
        """Of the first `size` words. Samples mostly share a size, so the last result is kept."""
        if self._last[0] != size:
            whole, rest = divmod(size, len(self._words))
            text = " ".join([*list(self._words) * whole, *self._words[:rest]])
            self._last = size, self._split(text)
        return self._last[1]


def sentence_splitter() -> Splitter | None:
    """nltk's splitter for English, which RULER uses; None where nltk or its punkt_tab data isn't there."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab/english/")
    except (ImportError, LookupError):
        return None
    from nltk.tokenize import sent_tokenize

    return lambda text: list(sent_tokenize(text))


def split_at_stops(text: str) -> list[str]:
    """Sentences by rule: they end at . ! or ?, with closing quotes or brackets, before space."""
    return re.findall(r"\S.*?(?:[.!?]+[\"'\u201d\u2019)\]]*(?=\s)|$)", text.strip(), flags=re.DOTALL)


# --- questions


class Question(NamedTuple):
    """One question over documents.

    Args:
        query: the question.
        answers: accepted ones.
        gold: numbers of the documents that answer it.
        related: numbers of documents that stand with it before any others do.
    """

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


class QuestionSet(NamedTuple):
    """Documents, each once and sorted, and questions in their file's order."""

    documents: list[str]
    questions: list[Question]


def squad(path: Path) -> QuestionSet:
    """SQuAD 2.0 (Rajpurkar et al., arXiv 1806.03822): answerable questions; related is the same article.

    Raises:
        DataError: the file is something else.
    """
    try:
        articles = [article["paragraphs"] for article in _json(path)["data"]]
        documents = sorted({part["context"] for parts in articles for part in parts})
        number = {text: place for place, text in enumerate(documents)}
        questions = [
            _squad_question(entry, number[part["context"]], [number[other["context"]] for other in parts])
            for parts in articles
            for part in parts
            for entry in part["qas"]
            if not entry["is_impossible"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not in the form of SQuAD's dev-v2.0.json ({error!r})") from error
    return _checked(path, documents, questions)


def _squad_question(entry: dict[str, Any], gold: int, article: Sequence[int]) -> Question:
    related = tuple(dict.fromkeys(place for place in article if place != gold))
    answers = tuple(answer["text"] for answer in entry["answers"])
    return Question(entry["question"], answers, (gold,), related)


def hotpotqa(path: Path) -> QuestionSet:
    """HotpotQA's distractor set (Yang et al., arXiv 1809.09600): ten documents a question, all of them kept.

    Raises:
        DataError: the file is something else.
    """
    try:
        rows = _json(path)
        texts = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in rows]
        documents = sorted({text for own in texts for text in own})
        number = {text: place for place, text in enumerate(documents)}
        questions = [
            Question(row["question"], (row["answer"],), tuple(dict.fromkeys(number[text] for text in own)))
            for row, own in zip(rows, texts, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not in the form of HotpotQA's distractor file ({error!r})") from error
    return _checked(path, documents, questions)


def _checked(path: Path, documents: list[str], questions: list[Question]) -> QuestionSet:
    for question in questions:
        if not question.answers or not all(question.answers):
            raise DataError(f"{path}: the question {question.query[:60]!r} has no answer")
    if not questions:
        raise DataError(f"{path} has no question to ask")
    return QuestionSet(documents, questions)
