"""Training rows and test items for the embedded model, as bytes: filler with facts, then questions.

Half of the filler is the standard library's own source (the last 5% held out), half our prose. A row is a
pure function of a seed and its index, so workers may build them in any order. Knows numpy, no tensor, no
model.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from hcache.tiny.prose import prose
from hcache.tiny.text import KINDS, Keys, Puzzle, distractors, puzzle, scatter, shuffle

PROSE_BYTES = 8_000_000
HELD_OUT_SHARE = 0.05
KIND_WEIGHTS: Mapping[str, float] = {"single": 0.3, "multi": 0.4, "chain": 0.3}
MULTI_KEYS = (2, 3, 4, 4, 4, 5, 6)
MAX_QUESTIONS = 24
MAX_FACTS = 64
FACT_SHARE = 0.44  # of a row, at most
QUESTION_SHARE = 0.5
REPEAT_SHARE = 0.3  # of the questions are asked again, so that ruling out what was asked doesn't help
LM_SHARE = 8  # one position in so many carries the language-modelling loss


@lru_cache(maxsize=2)
def code_text(held_out: bool) -> bytes:
    """The standard library's .py files in sorted order: the first 95%, or the held-out rest."""
    root = Path(os.__file__).parent
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    text = b"\n".join(path.read_bytes() for path in files)
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    return text[cut:] if held_out else text[:cut]


@lru_cache(maxsize=2)
def prose_text(held_out: bool) -> bytes:
    """A long stretch of prose; the held-out one comes from another seed."""
    size = PROSE_BYTES // 10 if held_out else PROSE_BYTES
    return prose(Random("held-out-prose" if held_out else "training-prose"), size).encode()


def window(rng: Random, text: bytes, size: int) -> bytes:
    """`size` bytes of `text` from a random place. Raises ValueError if the text is shorter."""
    if len(text) < size:
        raise ValueError(f"a filler text of {len(text)} bytes is too short for a window of {size}")
    start = int(rng.random() * (len(text) - size + 1))
    return text[start : start + size]


def filler(rng: Random, size: int, held_out: bool = False) -> bytes:
    """`size` bytes of code or of prose, with equal chances."""
    return window(rng, code_text(held_out) if rng.random() < 0.5 else prose_text(held_out), size)


@dataclass(frozen=True)
class Batch:
    """One step's rows.

    tokens [B, T] uint8. `answers` and `language`: flat positions (row * T + column) whose NEXT byte is an
    answer byte, or any byte drawn for language modelling.
    """

    tokens: NDArray[np.uint8]
    answers: NDArray[np.int64]
    language: NDArray[np.int64]


def make_batch(seed: str, length: int, rows: int, kinds: Sequence[str]) -> Batch:
    """`rows` training rows of `length` bytes that ask `kinds`; a pure function of its arguments."""
    rng = Random(seed)
    tokens = np.empty((rows, length), dtype=np.uint8)
    answers: list[NDArray[np.int64]] = []
    for index in range(rows):
        row, spans = training_row(rng, length, kinds)
        tokens[index] = np.frombuffer(row, dtype=np.uint8)
        answers += [np.arange(start, stop) + (index * length - 1) for start, stop in spans]
    numbers = np.random.default_rng(int(rng.random() * 2**52))
    columns = numbers.integers(0, length - 1, size=rows * length // LM_SHARE)
    language = numbers.integers(0, rows, size=columns.size) * length + columns
    return Batch(tokens, np.concatenate(answers), np.sort(language))


def training_row(rng: Random, length: int, kinds: Sequence[str]) -> tuple[bytes, list[tuple[int, int]]]:
    """One row and the [start, stop) places of its answers, ends included."""
    keys = Keys(rng)
    puzzles = _puzzles(rng, keys, length, kinds)
    facts = list(dict.fromkeys(fact for item in puzzles for fact in item.facts))
    facts += _spare_facts(rng, keys, length, facts)
    shuffle(rng, facts)
    asked = [item.asked for item in puzzles]
    size = length - sum(map(len, facts)) - sum(map(len, asked))
    tail = int(rng.random() ** 2 * 0.6 * size) if rng.random() < 0.25 else 0
    context = scatter(rng, filler(rng, size - tail), facts, even=rng.random() < 0.5)
    spans = _spans(len(context), puzzles)
    return context + "".join(asked).encode() + filler(rng, tail), spans


def _spans(start: int, puzzles: Sequence[Puzzle]) -> list[tuple[int, int]]:
    """The places of the answers of questions that follow one another from `start`."""
    spans = []
    for item in puzzles:
        begin = start + len(item.question) + len(item.answer_prefix)
        start += len(item.asked)
        spans.append((begin, start))
    return spans


def _puzzles(rng: Random, keys: Keys, length: int, kinds: Sequence[str]) -> list[Puzzle]:
    """As many questions as were wished for, or as fit; at least one."""
    wanted = 1 + int((1 - rng.random() ** 2) * (3 if rng.random() < 0.15 else MAX_QUESTIONS))
    weights = [KIND_WEIGHTS[kind] for kind in kinds]
    puzzles: list[Puzzle] = []
    fact_bytes = question_bytes = misses = 0
    while len(puzzles) < wanted and misses < 3:
        kind = rng.choices(kinds, weights)[0]
        again = bool(puzzles) and rng.random() < REPEAT_SHARE
        if again:
            item = puzzles[int(rng.random() * len(puzzles))]
        else:
            item = puzzle(rng, kind, keys, MULTI_KEYS[int(rng.random() * len(MULTI_KEYS))])
        facts, question = 0 if again else sum(map(len, item.facts)), len(item.asked)
        if fact_bytes + facts > FACT_SHARE * length or question_bytes + question > QUESTION_SHARE * length:
            misses += 1
            continue
        puzzles.append(item)
        fact_bytes += facts
        question_bytes += question
    return puzzles or [puzzle(rng, "single", keys)]


def _spare_facts(rng: Random, keys: Keys, length: int, facts: Sequence[str]) -> list[str]:
    """Distractors: few or many, within the row's share of facts."""
    room = int((FACT_SHARE * length - sum(map(len, facts))) // 39)
    most = max(0, min(room, MAX_FACTS - len(facts)))
    return distractors(rng, keys, int(rng.random() ** 2 * (most + 1)))


@dataclass(frozen=True)
class Items:
    """Held-out test prompts with their answers, each row ending in exactly one answered question.

    tokens [N, T] uint8; `starts` [N] where the answer begins (the row ends with the answer);
    `values` [N, M, 2]: the places of the digits of each answer.
    """

    tokens: NDArray[np.uint8]
    starts: NDArray[np.int64]
    values: list[list[tuple[int, int]]]


def make_items(kind: str, length: int, count: int, source: str, facts: int = 12, seed: int = 0) -> Items:
    """`count` prompts whose last answer ends at byte `length`, over held-out "prose" or "code"."""
    text = {"prose": prose_text, "code": code_text}[source](True)
    tokens = np.empty((count, length), dtype=np.uint8)
    starts, values = [], []
    for index in range(count):
        rng = Random(f"held-out-{seed}-{source}-{kind}-{length}-{index}")
        keys = Keys(rng)
        item = puzzle(rng, kind, keys, 4 if length >= 512 else 2)
        spare = distractors(rng, keys, min(facts, (length // 3) // 39))
        hidden = [*item.facts, *spare]
        shuffle(rng, hidden)
        size = length - sum(map(len, hidden)) - len(item.asked)
        row = scatter(rng, window(rng, text, size), hidden) + item.asked.encode()
        tokens[index] = np.frombuffer(row, dtype=np.uint8)
        starts.append(length - len(item.answer) - 2)
        values.append([_place(row, starts[-1], value) for value in _said(item)])
    return Items(tokens, np.asarray(starts), values)


def _said(item: Puzzle) -> list[str]:
    """What the answer says for each key: the value, after the key where the key is said."""
    if item.kind == "single":
        return list(item.values)
    return [f"{key} {value}" for key, value in zip(item.keys, item.values, strict=True)]


def _place(row: bytes, start: int, said: str) -> tuple[int, int]:
    begin = row.index(said.encode(), start)
    return begin, begin + len(said)


assert set(KIND_WEIGHTS) == set(KINDS)
