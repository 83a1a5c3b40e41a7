"""What a benchmark is: examples in parts, a score for each answer, an average of the tasks.

A benchmark is a frozen dataclass whose fields are its settings. How prompts are batched, templated and run is
the runner's business; nothing here knows a model or a method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

from hcache.registry import Registry, unknown_name


@dataclass(frozen=True)
class Example:
    """One prompt, `context + question + answer_prefix`, and what is right.

    Args:
        task: name of its row in the results.
        id: unique within the task.
        answers: accepted answers, or the parts of one answer; the metric says which.
        max_new_tokens: enough for the answer in any tokenizer.
        stop: texts that end the answer.
        metric: name of the score.
        extra: whatever else scoring needs, as JSON data.
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

    @property
    def prompt(self) -> str:
        """The whole prompt, as a model sees it when the question is known while compressing."""
        return self.context + self.question + self.answer_prefix


@dataclass(frozen=True)
class Benchmark(ABC):
    """Settings every benchmark has.

    Args:
        tasks: which of its tasks to run.
        limit: examples of each task; None for all.
        query_aware: whether the question is visible while the cache is compressed, or follows afterwards.
        protocol: named rules of prompting and post-processing.
    """

    name: ClassVar[str] = ""

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    query_aware: bool = True
    protocol: str = "plain"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
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

    def prompt_lengths(self) -> tuple[int, ...] | None:
        """Lengths in tokens of the compressed prompts, if known before a tokenizer is there; else None."""
        return None

    def postprocess(self, text: str, example: Example) -> str:
        """The answer in what a model wrote: cut at the first stop text, without surrounding space."""
        for stop in example.stop:
            text = text.split(stop, 1)[0]
        return text.strip()

    @abstractmethod
    def score(self, example: Example | str, prediction: str, answers: Sequence[str], **extra: Any) -> float:
        """Score of one prediction, 0 to 1.

        Args:
            example: the example, or the name of its task; then `extra` holds what the example's would.
        """

    def aggregate(self, scores: Mapping[str, float], kind: str = "official") -> float:
        """The benchmark's average of its tasks, on their scale: the mean. Raises ValueError for no task."""
        if kind != "official":
            raise ValueError(
                f"benchmark '{self.name}': {unknown_name('kind of average', kind, ['official'])}"
            )
        if not scores:
            raise ValueError(f"benchmark '{self.name}': no scores to average")
        return fmean(scores.values())


BENCHMARKS: Registry[Benchmark] = Registry("benchmark")
