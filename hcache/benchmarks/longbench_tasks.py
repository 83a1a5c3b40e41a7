"""LongBench's tasks: category, language, metric and rules of each, and the averages over them.

The table is the paper's and the official code's; the card beside this file says more. Knows no file and no
prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hcache.benchmarks.base import Tree, by_task
from hcache.registry import unknown_name

KINDS = ("official", "official_en", "official_zh", "kv_papers")
BUCKETS = ("0-4k", "4-8k", "8k+")


class Task(NamedTuple):
    """What is known of a task.

    Args:
        category: of the six that the official average has.
        language: en, zh or code.
        metric: its name in the scoring module.
        rows: of its file.
        e_rows: of its file in LongBench-E; 0 where there is none.
        chat: the prompt goes into the model's chat template.
        stop: texts that end the answer.
    """

    category: str
    language: str
    metric: str
    rows: int = 200
    e_rows: int = 0
    chat: bool = True
    stop: tuple[str, ...] = ()


TABLE = {
    "narrativeqa": Task("single", "en", "qa_f1"),
    "qasper": Task("single", "en", "qa_f1", e_rows=224),
    "multifieldqa_en": Task("single", "en", "qa_f1", rows=150, e_rows=150),
    "multifieldqa_zh": Task("single", "zh", "qa_f1_zh"),
    "hotpotqa": Task("multi", "en", "qa_f1", e_rows=300),
    "2wikimqa": Task("multi", "en", "qa_f1", e_rows=300),
    "musique": Task("multi", "en", "qa_f1"),
    "dureader": Task("multi", "zh", "rouge_zh"),
    "gov_report": Task("summary", "en", "rouge-l", e_rows=300),
    "qmsum": Task("summary", "en", "rouge-l"),
    "multi_news": Task("summary", "en", "rouge-l", e_rows=294),
    "vcsum": Task("summary", "zh", "rouge_zh"),
    "trec": Task("few_shot", "en", "classification", e_rows=300, chat=False),
    "triviaqa": Task("few_shot", "en", "qa_f1", e_rows=300, chat=False),
    "samsum": Task("few_shot", "en", "rouge-l", e_rows=300, chat=False, stop=("\n",)),
    "lsht": Task("few_shot", "zh", "classification", chat=False),
    "passage_count": Task("synthetic", "en", "count", e_rows=300),
    "passage_retrieval_en": Task("synthetic", "en", "retrieval", e_rows=300),
    "passage_retrieval_zh": Task("synthetic", "zh", "retrieval_zh"),
    "lcc": Task("code", "code", "code_sim", rows=500, e_rows=300, chat=False),
    "repobench-p": Task("code", "code", "code_sim", rows=500, e_rows=300, chat=False),
}
TASKS = tuple(TABLE)
E_TASKS = tuple(f"{name}_e" for name, task in TABLE.items() if task.e_rows)
KV_PAPERS = tuple(name for name, task in TABLE.items() if task.language != "zh")
"""The 16 English and code tasks whose plain mean papers on KV caches report."""


def base_task(task: str) -> str:
    """The task whose prompt, metric and rules a task has: a LongBench-E task is called `<task>_e`."""
    return task.removesuffix("_e") if task in E_TASKS else task


def known_task(task: str) -> Task:
    """What is known of a task. Raises ValueError for an unknown one, with a suggestion."""
    base = base_task(task)
    if base not in TABLE:
        raise ValueError(f"benchmark 'longbench': {unknown_name('task', task, [*TASKS, *E_TASKS])}")
    return TABLE[base]


def row_count(task: str) -> int:
    """Rows that the authors' file has."""
    return known_task(task).e_rows if task in E_TASKS else known_task(task).rows


def groups(tasks: Iterable[str], kind: str) -> list[list[str]]:
    """The tasks of an average, in groups whose means it is the mean of; none where it can't be had.

    LongBench-E has other rows: it counts only where nothing else was run.
    """
    tasks = list(tasks)
    if kind == "kv_papers":
        return [[task] for task in KV_PAPERS] if set(KV_PAPERS) <= set(tasks) else []
    chosen = [task for task in tasks if task in TABLE] or tasks
    language = kind.removeprefix("official").removeprefix("_")
    if language:
        chosen = [task for task in chosen if known_task(task).language in (language, "code")]
        if not any(known_task(task).language == language for task in chosen):
            return []
    return by_category(chosen)


def by_category(tasks: Iterable[str]) -> list[list[str]]:
    """Tasks of one category together."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(known_task(task).category, []).append(task)
    return list(found.values())


def no_average(tasks: Iterable[str], kind: str) -> str:
    """Why there are no groups for an average."""
    tasks = list(tasks)
    if not tasks:
        return "no scores to average"
    if kind == "kv_papers":
        missing = [task for task in KV_PAPERS if task not in tasks]
        return f"kv_papers is the mean of {len(KV_PAPERS)} tasks, missing are {', '.join(missing)}"
    return f"{kind} needs a task of that language; given are {', '.join(tasks)}"


def bucket(length: int) -> str:
    """The bucket of LongBench-E that a row of so many words belongs to."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def bucket_trees(lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
    """LongBench-E: for each bucket that has rows, categories of tasks of scores."""
    found: dict[str, Tree] = {}
    for name in BUCKETS:
        scores = by_task([li for li in lines if li["task"] in E_TASKS and bucket(li["length"]) == name])
        if scores:
            found[name] = [[scores[task] for task in tasks] for tasks in by_category(scores)]
    return found
