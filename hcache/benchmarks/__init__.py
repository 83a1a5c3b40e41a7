"""Benchmarks by name: load examples, score predictions, average tasks.

    examples = hcache.benchmarks.load("retrieval", lengths=[4096], examples_per_task=5)
    value = hcache.benchmarks.score("retrieval", "single_4096", "4821.", ["4821"])

Importing this registers every benchmark. Knows no model and no method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hcache.benchmarks import infinitebench, lm_eval, longbench, longbench_v2, needle, ruler  # noqa: F401
from hcache.benchmarks.base import BENCHMARKS, Benchmark, Example
from hcache.benchmarks.longbench_tasks import E_TASKS, KV_PAPERS
from hcache.benchmarks.retrieval import Retrieval
from hcache.registry import unknown_name

__all__ = ["BENCHMARKS", "Benchmark", "Example", "Retrieval", "aggregate", "load", "score"]


LONGBENCH_E = "longbench_e"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    LONGBENCH_E: ("longbench", {"tasks": E_TASKS}),
    "longbench_en16": ("longbench", {"tasks": KV_PAPERS}),
}
"""Names of another benchmark's settings, as in conf/benchmark/: whose they are, and which."""


def load(name: str, tokenizer: Any | None = None, **options: Any) -> list[Example]:
    """The examples of a benchmark.

    Args:
        name: of the benchmark or of a variant, `longbench_e`.
        tokenizer: measures lengths where a benchmark has them; None counts bytes, the embedded model's
            tokens.
        options: the benchmark's settings.

    Raises:
        ValueError: an unknown benchmark or setting, with a suggestion, or a value out of range.
    """
    kind, settings = _known(name)
    known = [item.name for item in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(f"benchmark '{name}': {unknown_name('setting', option, known)}")
    return kind(**{**settings, **options}).examples(tokenizer)


def score(
    name: str, task: str, prediction: str, answers: Any, *, protocol: str | None = None, **extra: Any
) -> float:
    """Score of one prediction, 0 to 1.

    Args:
        name: of the benchmark or of a variant, `longbench_e`.
        task: as results name it. LongBench-E's are `qasper_e`, and under `longbench_e` also `qasper`; RULER's
            and needle's may go without their length.
        answers: the field of the data's row as it is: a text, a number, a list of them, a list of lists.
        protocol: whose rules; None for the official ones.
        extra: what the task needs besides, as in `Example.extra`: `all_classes`, `options`, `rules`,
            `extraction`, `model_family`, `metric`, `keys`. What a task has no use for changes nothing.

    Raises:
        ValueError: an unknown benchmark, task or protocol, with a suggestion, or something that is missing.
    """
    kind, settings = _known(name)
    benchmark = kind(**settings) if protocol is None else kind(**settings, protocol=protocol)
    if name == LONGBENCH_E and f"{task}_e" in E_TASKS:
        task = f"{task}_e"
    plain = {key: _without_arrays(value) for key, value in extra.items()}
    return benchmark.score(task, prediction, _without_arrays(answers), **plain)


def aggregate(name: str, scores: Mapping[str, float], kind: str | None = None) -> float:
    """An average of a benchmark's tasks, on their scale.

    Args:
        kind: the benchmark says which there are; None is its own: `official`, or `mean` of InfiniteBench,
            whose authors have none.
    """
    benchmark = _known(name)[0]()
    return benchmark.aggregate(scores) if kind is None else benchmark.aggregate(scores, kind)


def _known(name: str) -> tuple[type[Benchmark], dict[str, Any]]:
    """The class and the settings of a name. Raises ValueError with a suggestion."""
    if name not in VARIANTS and name not in BENCHMARKS.names():
        raise ValueError(unknown_name("benchmark", name, [*BENCHMARKS.names(), *VARIANTS]))
    base, settings = VARIANTS.get(name, (name, {}))
    return BENCHMARKS.get(base), settings


def _without_arrays(value: Any) -> Any:
    """Lists where data frames have arrays."""
    return value.tolist() if hasattr(value, "tolist") else value
