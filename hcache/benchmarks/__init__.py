"""Benchmarks by name: load examples, score predictions, average tasks.

    examples = hcache.benchmarks.load("retrieval", lengths=[4096], examples_per_task=5)
    value = hcache.benchmarks.score("retrieval", "single_4096", "4821.", ["4821"])

Importing this registers every benchmark. Knows no model and no method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hcache.benchmarks import infinitebench, lm_eval, longbench, longbench_v2, needle, ruler  # noqa: F401
from hcache.benchmarks.base import BENCHMARKS, Benchmark, Example
from hcache.benchmarks.retrieval import Retrieval
from hcache.registry import unknown_name

__all__ = ["BENCHMARKS", "Benchmark", "Example", "Retrieval", "aggregate", "load", "score"]


def load(name: str, tokenizer: Any | None = None, **options: Any) -> list[Example]:
    """The examples of a benchmark.

    Args:
        tokenizer: measures lengths where a benchmark has them; None counts bytes, the embedded model's
            tokens.
        options: the benchmark's settings.

    Raises:
        ValueError: an unknown benchmark or setting, with a suggestion, or a value out of range.
    """
    kind = BENCHMARKS.get(name)
    known = [item.name for item in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(f"benchmark '{name}': {unknown_name('setting', option, known)}")
    return kind(**options).examples(tokenizer)


def score(name: str, task: str, prediction: str, answers: Sequence[str], **extra: Any) -> float:
    """Score of one prediction, 0 to 1. `extra`: what the task needs besides, as in `Example.extra`."""
    return BENCHMARKS.get(name)().score(task, prediction, answers, **extra)


def aggregate(name: str, scores: Mapping[str, float], kind: str = "official") -> float:
    """The benchmark's own average of its tasks' scores, on their scale."""
    return BENCHMARKS.get(name)().aggregate(scores, kind)
