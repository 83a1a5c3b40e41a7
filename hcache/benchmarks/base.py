"""What a benchmark is: examples in parts, a score for each answer, an average of the tasks.

A benchmark is a frozen dataclass whose fields are its settings. How prompts are batched, cut, templated and
run is the runner's business; nothing here knows a model or a method.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

from hcache.metrics import Tree, tree_mean
from hcache.registry import Registry, unknown_name

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Example",
    "FileBenchmark",
    "Second",
    "Shard",
    "Tree",
    "by_task",
    "shard_of",
    "texts_of",
    "tree_mean",
]


def by_task(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Scores of each task's examples, in the order of the lines."""
    found: dict[str, list[float]] = {}
    for line in lines:
        found.setdefault(line["task"], []).append(line["score"])
    return found


def texts_of(answers: Any) -> tuple[str, ...]:
    """Answers as a row or a record has them, as texts: one that stands alone is one of one, None is none."""
    if answers is None:
        return ()
    alone = isinstance(answers, str) or not isinstance(answers, Iterable)
    return tuple(str(answer) for answer in ((answers,) if alone else answers))


class Second(NamedTuple):
    """A short prompt that follows the first one's reply and begins anew: nothing is left in the cache.

    Args:
        before, after: what stands around the reply.
        max_new_tokens: of the answer.
    """

    before: str
    after: str
    max_new_tokens: int


@dataclass(frozen=True)
class Example:
    """One prompt, `context + question + answer_prefix`, and what is right.

    Args:
        task: name of its row in the results.
        id: unique within the task.
        answer_prefix: how the answer begins; with a chat template it stands in the model's own turn.
        answers: accepted answers, or the parts of one answer; the metric says which.
        max_new_tokens: enough for the answer in any tokenizer.
        stop: texts that end the answer.
        metric: name of the score.
        extra: whatever else scoring needs, as JSON data.
        chat: the protocol puts context and question into the model's chat template, if it has one.
        system: the system message there; None for none.
        never_empty: the first token of the answer may not be one that ends it.
        second: the prompt whose reply is the answer, where that of the first one isn't.
    """

    task: str
    id: str
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    metric: str
    extra: dict[str, Any] = field(default_factory=dict)
    chat: bool = False
    system: str | None = None
    never_empty: bool = False
    second: Second | None = None

    @property
    def prompt(self) -> str:
        """The whole prompt, as a model sees it when the question is known while compressing."""
        return self.context + self.question + self.answer_prefix

    def asked_again(self, reply: str) -> Example:
        """The example whose prompt is the second one, after this reply to the first."""
        assert self.second is not None, "the first reply is the answer"
        before, after, tokens = self.second
        context = before + reply.strip()
        return replace(self, context=context, question=after, max_new_tokens=tokens, second=None)


class Shard(NamedTuple):
    """Part number `part` of `parts`, counted from 0."""

    part: int
    parts: int

    def takes(self, place: int) -> bool:
        """Whether the batch at this place is in it."""
        return place % self.parts == self.part

    @property
    def label(self) -> str:
        """As a name of a directory."""
        return f"{self.part}of{self.parts}"


def shard_of(text: str | None) -> Shard | None:
    """The shard that "i/n" names. Raises ValueError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"benchmark.shard={text!r} must be i/n with 0 <= i < n, for example 0/4")
    return Shard(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Benchmark(ABC):
    """Settings every benchmark has.

    Args:
        tasks: which of its tasks to run.
        limit: examples of each task; None for all.
        query_aware: whether the question is visible while the cache is compressed, or follows afterwards.
        protocol: named rules of prompting and post-processing.
        shard: "i/n" runs every n-th batch from the i-th on, counted from 0; null runs all.
    """

    name: ClassVar[str] = ""
    by_library: ClassVar[bool] = False
    """Another library makes the prompts and the scores (runners.harness)."""

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    query_aware: bool = True
    protocol: str = "plain"
    shard: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        shard_of(self.shard)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"benchmark.limit={self.limit} must be at least 1, or null for every example")

    def check_tasks(self, known: Sequence[str]) -> None:
        """Raise ValueError for a task that is not known, for none and for one asked for twice."""
        for task in self.tasks:
            if task not in known:
                raise ValueError(f"benchmark.tasks: {unknown_name('task', task, known)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"benchmark.tasks={list(self.tasks)} must name each task once; choose of {list(known)}"
            )

    @abstractmethod
    def examples(self, tokenizer: Any | None) -> list[Example]:
        """The examples, in a fixed order; the tokenizer only measures lengths (None: one token a byte)."""

    def longest_prompt(self, window: int) -> int | None:
        """Tokens that the protocol cuts longer prompts to, in their middle; None where it cuts none.

        Args:
            window: positions the model has.
        """
        return None

    def identity(self) -> dict[str, Any]:
        """What besides the settings decides the examples (revisions, contents of files), for the record."""
        return {}

    def notes(self) -> list[str]:
        """What a reader of results must know about the examples; asked after they were made."""
        return []

    def files(self) -> list[Path]:
        """Get everything the examples are made from, for machines without a network; where it lies now."""
        return []

    def prompt_lengths(self) -> tuple[int, ...] | None:
        """Lengths in tokens of the compressed prompts, if known before a tokenizer is there; else None."""
        return None

    def postprocess(self, text: str, example: Example) -> str:
        """The answer in what a model wrote: cut at the first stop text, without surrounding space."""
        for stop in example.stop:
            text = text.split(stop, 1)[0]
        return text.strip()

    @abstractmethod
    def score(self, example: Example | str, prediction: str, answers: Any, **extra: Any) -> float:
        """Score of one prediction, 0 to 1.

        Args:
            example: the example, or the name of its task; then `extra` holds what the example's would.
            answers: as the example or the data's row has them: a list, or one that stands alone.
        """

    def aggregates(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
        """The benchmark's averages by name, as trees of example scores; `tree_mean` says how they are read.

        Args:
            lines: of predictions.jsonl: `task`, `score` (0 to 1) and what `Example.extra` held.
        """
        return {}

    def aggregate(self, scores: Mapping[str, float], kind: str = "official") -> float:
        """The benchmark's average of its tasks, on their scale: the mean. Raises ValueError for no task."""
        if kind != "official":
            raise ValueError(
                f"benchmark '{self.name}': {unknown_name('kind of average', kind, ['official'])}"
            )
        if not scores:
            raise ValueError(f"benchmark '{self.name}': no scores to average")
        return fmean(scores.values())


@dataclass(frozen=True)
class FileBenchmark(Benchmark):
    """A benchmark whose rows are files of its authors.

    Args:
        data_dir: a directory that holds the files; null looks in data/<benchmark>/, then on the Hub.
        prompt_dir: a checkout of the repository that the prompts are from; null fetches the pinned files.
        revision: of the data on the Hub; null is the pinned one.
        skip_bad_rows: count broken rows and say so instead of stopping.
        max_length: tokens of a prompt, longer ones lose their middle; null leaves it to the protocol.
        chat: prompts go into the model's chat template, all or none; null leaves it to the protocol.
    """

    data_dir: str | None = None
    prompt_dir: str | None = None
    revision: str | None = None
    skip_bad_rows: bool = False
    max_length: int | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"benchmark.max_length={self.max_length} must be at least 2, or null")

    def check_protocol(self, known: Sequence[str]) -> None:
        """Raise ValueError for a protocol that is not known."""
        if self.protocol not in known:
            raise ValueError(f"benchmark.protocol: {unknown_name('protocol', self.protocol, known)}")


BENCHMARKS: Registry[Benchmark] = Registry("benchmark")
