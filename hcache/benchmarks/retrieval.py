"""`retrieval`: facts hidden in generated prose, asked one by one, several at once, or through a pointer.

Made from a seed, text and facts our own; the card beside this file says what each task is for. The format is
the one the embedded model learned (hcache/tiny/text.py), on keys, values and prose it has never seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from hcache.benchmarks.base import BENCHMARKS, Benchmark, Example, texts_of
from hcache.metrics import exact_match
from hcache.registry import unknown_name
from hcache.tiny.prose import prose
from hcache.tiny.text import END, KINDS, Keys, Puzzle, distractors, puzzle, scatter, shuffle

SHORTEST = 256
FIT_TRIES = 24


@BENCHMARKS.register("retrieval")
@dataclass(frozen=True)
class Retrieval(Benchmark):
    """Settings of the benchmark.

    Args:
        tasks: of `single`, `multi`, `chain`; with each length one task of the results, `single_2048`.
        lengths: of the whole prompt in tokens of the model's tokenizer; the next possible length below is
            used.
        examples_per_task: of each task and length. Raising it adds examples and changes none.
        seed: another seed, other facts and other prose.
        multi_keys: codes asked at once by `multi`.
        distractors: facts nobody asks about.
    """

    tasks: tuple[str, ...] = KINDS
    lengths: tuple[int, ...] = (2048, 4096)
    examples_per_task: int = 20
    seed: int = 0
    multi_keys: int = 4
    distractors: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lengths", tuple(self.lengths))
        self.check_tasks(KINDS)
        if self.protocol != "plain":
            raise ValueError(f"benchmark.protocol: {unknown_name('protocol', self.protocol, ['plain'])}")
        if not self.lengths or len(set(self.lengths)) < len(self.lengths) or min(self.lengths) < SHORTEST:
            allowed = f"must name one or more different lengths, each at least {SHORTEST} tokens"
            raise ValueError(f"benchmark.lengths={list(self.lengths)} {allowed}")
        for field, least in (("examples_per_task", 1), ("multi_keys", 1), ("distractors", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"benchmark.{field}={getattr(self, field)} must be at least {least}")

    def prompt_lengths(self) -> tuple[int, ...] | None:
        """The lengths asked for; unknown where the question is held back from the compressed prompt."""
        return self.lengths if self.query_aware else None

    def examples(self, tokenizer: Any | None) -> list[Example]:
        """Task by task, length by length; the same for the same settings and tokenizer on every machine.

        Raises:
            ValueError: a length too short for the facts and the question.
        """
        count = self.examples_per_task if self.limit is None else min(self.limit, self.examples_per_task)
        return [
            self._example(task, length, index, tokenizer)
            for task in self.tasks
            for length in self.lengths
            for index in range(count)
        ]

    def _example(self, task: str, length: int, index: int, tokenizer: Any | None) -> Example:
        """Every example has a generator of its own, so that no setting of how many changes any."""
        name = f"{self.seed}-{task}-{length}-{index}"
        rng = Random(name)
        keys = Keys(rng)
        asked = puzzle(rng, task, keys, self.multi_keys)
        facts = [*asked.facts, *distractors(rng, keys, self.distractors)]
        shuffle(rng, facts)
        question = asked.question + asked.answer_prefix

        def context(size: int) -> str:
            """The facts in `size` bytes of prose; more bytes only lengthen it."""
            filler = prose(Random(f"{name}-prose"), size).encode()
            return scatter(Random(f"{name}-places"), filler, facts).decode()

        size = _fit(lambda size: _tokens(tokenizer, context(size) + question), length)
        return self._finished(asked, length, index, context(size))

    def _finished(self, asked: Puzzle, length: int, index: int, context: str) -> Example:
        return Example(
            task=f"{asked.kind}_{length}",
            id=str(index),
            context=context,
            question=asked.question,
            answer_prefix=asked.answer_prefix,
            answers=asked.values,
            max_new_tokens=len(asked.answer) + len(END),
            stop=("\n",),
            metric="exact_match",
            extra={"length": length, "keys": list(asked.keys)},
        )

    def score(self, example: Example | str, prediction: str, answers: Any, **extra: Any) -> float:
        """Share of the asked keys whose value is exactly right.

        `single` answers with its first number and `chain` with its last; `multi` says each key and its value,
        or, if it says no key, the values in the order asked.

        Args:
            answers: the values asked for.
            extra: `keys`, the keys asked for, which `multi` needs where the example itself isn't given.

        Raises:
            ValueError: an unknown task, or `keys` missing or not one for each answer.
        """
        task = example if isinstance(example, str) else example.task
        keys = extra.get("keys") if isinstance(example, str) else example.extra["keys"]
        answers = texts_of(answers)
        kind = task.split("_", 1)[0]
        if kind not in KINDS:
            raise ValueError(f"benchmark 'retrieval': {unknown_name('task', kind, KINDS)}")
        if kind != "multi":
            numbers = re.findall(r"\d+", prediction)
            return exact_match([numbers[-(kind == "chain")]] if numbers else [""], answers)
        if keys is None or len(keys) != len(answers):
            raise ValueError(
                f"benchmark 'retrieval': multi needs keys=[...], one for each answer; got {keys!r}"
            )
        return exact_match(said_values(prediction, keys), answers)


def said_values(prediction: str, keys: Sequence[str]) -> list[str]:
    """The value a prediction gives for each key: the number soon after it, "" where there is none.

    Where no key is said at all, the numbers in order.
    """
    if not any(key in prediction for key in keys):
        numbers = re.findall(r"\d+", prediction)
        return [*numbers, *[""] * len(keys)][: len(keys)]
    found = [re.search(rf"\b{re.escape(key)}\b(?:\W|\bis\b)+(\d+)", prediction) for key in keys]
    return [match.group(1) if match else "" for match in found]


def _tokens(tokenizer: Any | None, text: str) -> int:
    """Tokens of a prompt, the tokenizer's own start token included; bytes without a tokenizer."""
    return len(text.encode()) if tokenizer is None else len(tokenizer.encode(text))


def _fit(tokens: Callable[[int], int], length: int) -> int:
    """The largest size found with tokens(size) <= length: exact for bytes, else within a token or two.

    Raises:
        ValueError: no size fits.
    """
    low, least = 1, tokens(1)
    if least > length:
        raise ValueError(
            f"benchmark.lengths={length} is too short: the facts and the question alone take {least} tokens; "
            "raise it, or lower benchmark.distractors or benchmark.multi_keys"
        )
    at_low, high = least, None
    size = low + length - at_low
    for _ in range(FIT_TRIES):
        found = tokens(size)
        if found <= length:
            low, at_low = size, found
        else:
            high = size
        if at_low == length or (high is not None and high - low <= 1):
            break
        size = _next_size(low, high, at_low - least, length - least)
    return low


def _next_size(low: int, high: int | None, reached: int, wanted: int) -> int:
    """In proportion to what was reached at `low`, inside (low, high)."""
    size = int(low * wanted / reached) if reached > 0 else 2 * low
    if high is None:
        return max(low + 1, size)
    return size if low < size < high else (low + high) // 2
