"""RULER's five families of tasks (Hsieh et al., arXiv 2404.06654), each drawing prompts of a given size.

The rules are those of scripts/data/synthetic/*.py at c3f5e3b, the code is our own. One generator, seeded
once, draws everything of a task and length; what is shuffled is shuffled by a fresh generator of the same
seed, so in the same way in every sample. The card says what could not be followed. Tokens are counted by
`Room` alone.
"""

from __future__ import annotations

import dataclasses
import math
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np

from hcache.benchmarks.ruler_fit import Room, best_size
from hcache.benchmarks.ruler_template import Parts, Template
from hcache.benchmarks.ruler_words import Essays, QuestionSet, adjective_nouns, plain_words
from hcache.benchmarks.source import DataError

T = TypeVar("T")

SHORT = 4096
"""Below this length lines are taken away fewer at a time, and words are repeated less often."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Where needles may lie between an essay's sentences, in percent."""


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """The items in the order that this seed gives every list of their number."""
    found = list(items)
    Random(seed).shuffle(found)
    return found


def distinct_names(rng: Random, count: int, letters: str, length: int) -> list[str]:
    """Different random names, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(letters, k=length))] = None
    return list(found)


# --- needles


@dataclass(frozen=True)
class NeedleTask:
    """What tells the eight needle tasks apart.

    Args:
        haystack: noise (one line again and again), essay, or needle (facts of the same kind).
        key, value: words, numbers or uuids.
        keys: facts' keys; `values` of each; `queries` of the keys are asked.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essay"),
    "niah_single_3": NeedleTask("essay", value="uuids"),
    "niah_multikey_1": NeedleTask("essay", keys=4),
    "niah_multikey_2": NeedleTask("needle"),
    "niah_multikey_3": NeedleTask("needle", key="uuids", value="uuids"),
    "niah_multivalue": NeedleTask("essay", values=4),
    "niah_multiquery": NeedleTask("essay", keys=4, queries=4),
}


class Needles:
    """Facts among lines or sentences; the values of some keys are asked."""

    most: int | None = None

    def __init__(
        self, task: NeedleTask, template: Template, length: int, seed: int, essays: Essays | None
    ) -> None:
        single = task.queries * task.values == 1
        self._task, self._seed, self._essays = task, seed, essays
        self._template = template.singular() if single else template
        self._value_name = task.value[:-1] if single else task.value
        self._rng = Random(seed)
        self.least = 1 if task.haystack == "essay" else task.keys * task.values
        self.step = 500 if task.haystack == "essay" else 5 if length < SHORT else 25

    def draw(self, size: int, index: int) -> Parts:
        """`size` is lines, or words of the essays."""
        task = self._task
        facts: dict[str, list[str]] = {}
        while len(facts) < task.keys:
            key = self._random(task.key)
            facts[key] = [self._random(task.value) for _ in range(task.values)]
        needles = [self._fact(key, value) for key, values in facts.items() for value in values]
        needles = shuffled(needles, self._seed)
        context = self._among_sentences(needles, size) if self._essays else self._among_lines(needles, size)
        asked = self._rng.sample(list(facts), task.queries)
        answers = tuple(value for key in asked for value in facts[key])
        return self._template.filled(context, answers, query=listed(asked), type_needle_v=self._value_name)

    def _fact(self, key: str, value: str) -> str:
        return f"One of the special magic {self._task.value} for {key} is: {value}."

    def _random(self, kind: str) -> str:
        if kind == "words":
            return self._rng.choice(adjective_nouns())
        if kind == "numbers":
            return str(self._rng.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))

    def _among_lines(self, needles: Sequence[str], size: int) -> str:
        if self._task.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [
                self._fact(self._random(self._task.key), self._random(self._task.value)) for _ in range(size)
            ]
        places = sorted(self._rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _among_sentences(self, needles: Sequence[str], size: int) -> str:
        assert self._essays is not None
        sentences = self._essays.sentences(size)
        depths = sorted(self._rng.sample(DEPTHS, len(needles)))
        pieces: list[str] = []
        done = 0
        for depth, needle in zip(depths, needles, strict=True):
            place = len(sentences) * depth // 100
            pieces += [*sentences[done:place], needle]
            done = place
        return " ".join([*pieces, *sentences[done:]])


def listed(names: Sequence[str]) -> str:
    """As RULER writes several names: "a, b, and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


# --- variable tracking


class Chain(NamedTuple):
    """Assignments in lines of noise: the value to the first name, each name to the next.

    Args:
        names: of the variables, in order.
        value: of all of them.
        places: of their lines among the noise.
        lines: of noise.
    """

    names: list[str]
    value: int
    places: list[int]
    lines: int

    @property
    def text(self) -> str:
        """The lines; those that name another variable end in a space."""
        said = [f"VAR {self.names[0]} = {self.value}"]
        said += [f"VAR {b} = VAR {a} " for a, b in zip(self.names, self.names[1:], strict=False)]
        lines = [NOISE] * self.lines
        for shift, (place, line) in enumerate(zip(self.places, said, strict=True)):
            lines.insert(place + shift, line)
        return "\n".join(lines)

    def parts(self, template: Template, before: str = "") -> Parts:
        """As a prompt that asks for all the names."""
        count = len(self.names)
        return template.filled(self.text, tuple(self.names), before, query=str(self.value), num_v=count)


class _ExampleChains:
    """The worked example of variable tracking: shorter names, always the same value."""

    step, most = 5, None
    value, name_letters = 12345, 3

    def __init__(self, template: Template, rng: Random, hops: int) -> None:
        self._template, self._rng, self._count = template, rng, hops + 1
        self.least = self._count

    def chain(self, size: int) -> Chain:
        """In `size` lines of noise."""
        names = distinct_names(self._rng, self._count, string.ascii_uppercase, self.name_letters)
        return Chain(names, self.value, sorted(self._rng.sample(range(size), self._count)), size)

    def draw(self, size: int, index: int) -> Parts:
        return self.chain(size).parts(self._template)


class VariableTracking:
    """One chain of four hops; its five names are asked, after one worked example."""

    most: int | None = None
    hops, name_letters, example_tokens = 4, 5, 500

    def __init__(self, template: Template, length: int, seed: int, room: Room) -> None:
        self._template, self._rng, self._numbers = template, Random(seed), np.random.RandomState(seed)
        self.least, self.step = self.hops + 1, 5 if length < SHORT else 10
        self.example_is_long = False
        self._example = self._made_example(room)

    def _made_example(self, room: Room) -> Chain:
        """In its own budget; where even the smallest is longer in this tokenizer, that one."""
        examples = _ExampleChains(self._template, self._rng, self.hops)
        budget = dataclasses.replace(room, length=self.example_tokens)
        smallest = examples.chain(examples.least)
        if not budget.fits(smallest.parts(self._template)):
            self.example_is_long = True
            return smallest
        return examples.chain(best_size(examples, budget))

    def draw(self, size: int, index: int) -> Parts:
        """`size` is lines of noise."""
        names = distinct_names(self._rng, self.hops + 1, string.ascii_uppercase, self.name_letters)
        value = int(self._numbers.randint(10_000, 99_999))
        places = sorted(self._rng.sample(range(size), len(names)))
        return Chain(names, value, places, size).parts(self._template, before=self._worked())

    def _worked(self) -> str:
        """The example under new names, with its answer."""
        count, letters = self.hops + 1, _ExampleChains.name_letters
        chain = self._example._replace(
            names=distinct_names(self._rng, count, string.ascii_uppercase, letters)
        )
        return worked(chain.parts(self._template).text, " ".join(chain.names))


def worked(prompt: str, answer: str) -> str:
    """A prompt with its answer, to stand before another: one space between them, a line break behind."""
    return f"{prompt.rstrip(' ')} {answer}\n"


# --- words by how often they come


class Repeats(NamedTuple):
    """How often words of a list come: `common` ones, and all others."""

    common: int
    others: int


class CommonWords:
    """The ten words that come most often in a numbered list, after one worked example.

    Args:
        more_words: to draw from where a list needs more different words than wonderwords has.
    """

    step, asked = 10, 10

    def __init__(
        self, template: Template, length: int, seed: int, more_words: Sequence[str] | None = None
    ) -> None:
        self._template, self._seed, self._rng = template, seed, Random(seed)
        self._words, self._more = shuffled(plain_words(), seed), more_words
        self._repeats = Repeats(6, 1) if length < SHORT else Repeats(30, 3)
        self._example = (20, Repeats(3, 1)) if length < SHORT else (40, Repeats(10, 3))
        self.least, self.most = self.asked, max(len(self._words), len(more_words or ()))

    def draw(self, size: int, index: int) -> Parts:
        """`size` is different words."""
        shown, answer = self._list(*self._example)
        example = self._template.filled(shown, answer, query="")
        context, answers = self._list(size, self._repeats)
        return self._template.filled(context, answers, worked(example.text, numbered(answer)), query="")

    def _list(self, size: int, repeats: Repeats) -> tuple[str, tuple[str, ...]]:
        """A numbered list, and the common ones of its words."""
        pool = self._words if size <= len(self._words) or self._more is None else self._more
        words = self._rng.sample(pool, size)
        common, others = words[: self.asked], words[self.asked :]
        return numbered(shuffled(common * repeats.common + others * repeats.others, self._seed)), tuple(
            common
        )


def numbered(words: Sequence[str]) -> str:
    """ "1. a 2. b"."""
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, start=1))


class FrequentWords:
    """The three coded words that come most often, by Zipf's law, but for dots, which come more often yet."""

    step, most = 10, None
    least = 100  # below it two of the first ranks can come equally often
    letters, asked = 6, 3

    def __init__(self, template: Template, length: int, seed: int) -> None:
        self._template, self._seed, self._rng = template, seed, Random(seed)
        self._kinds = (length - template.new_tokens) // 50

    def draw(self, size: int, index: int) -> Parts:
        """`size` is words, but for what the counts lose in rounding down."""
        kinds = distinct_names(self._rng, self._kinds, string.ascii_lowercase, self.letters)
        kinds = ["...", *shuffled(sorted(kinds), self._seed)[1:]]
        said = [word for rank, word in enumerate(kinds, start=1) for _ in range(zipf_count(size, rank))]
        context = " ".join(shuffled(said, self._seed))
        return self._template.filled(context, tuple(kinds[1 : 1 + self.asked]), query="")


def zipf_count(words: int, rank: int) -> int:
    """How many of so many words the rank has, under Zipf's law with exponent 2 (zeta(2) = pi^2 / 6)."""
    return int(words * rank**-2.0 / (math.pi**2 / 6))


# --- questions over documents


class Documents:
    """A question over numbered documents; sample i asks question i."""

    least, step = 1, 10

    def __init__(self, template: Template, seed: int, data: QuestionSet) -> None:
        self._template, self._seed, self._rng, self._data = template, seed, Random(seed), data
        self.most = len(data.documents)

    def draw(self, size: int, index: int) -> Parts:
        """`size` is documents; never fewer than those that hold the answer, none twice.

        Raises:
            DataError: there is no question of this number.
        """
        if index >= len(self._data.questions):
            raise DataError(
                f"benchmark.examples_per_task asks for more than the {len(self._data.questions)} questions "
                "there are; lower it"
            )
        question = self._data.questions[index]
        near = list(question.gold)
        if size - len(near) <= len(question.related):
            near += self._rng.sample(question.related, max(0, size - len(near)))
        else:
            near += question.related
            taken = set(near)
            others = [place for place in range(len(self._data.documents)) if place not in taken]
            near += self._rng.sample(others, min(len(others), size - len(near)))
        texts = [self._data.documents[place] for place in shuffled(near, self._seed)]
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, start=1))
        return self._template.filled(context, question.answers, query=question.query)
