"""`longbench`: LongBench (Bai et al. 2024, arXiv 2308.14508), 21 tasks, and the 13 of LongBench-E.

Rows are the authors' files and prompts their templates, neither of which is held here. A prompt is split
behind its context: what a template says from there on is the question. The card beside this file has the
protocols and what differs from the official code. Cutting and chat templates are the runner's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from string import Formatter
from typing import Any, NamedTuple

from hcache.benchmarks.base import BENCHMARKS, Example, FileBenchmark, Tree, by_task, texts_of
from hcache.benchmarks.longbench_rows import ARCHIVE, Record, names_of, records, short
from hcache.benchmarks.longbench_tasks import (
    BUCKETS,
    E_TASKS,
    KINDS,
    TABLE,
    TASKS,
    base_task,
    bucket_trees,
    groups,
    known_task,
    no_average,
    row_count,
)
from hcache.benchmarks.prompt_files import PromptFile
from hcache.benchmarks.scoring import longbench as scoring
from hcache.benchmarks.source import DataError, HubFiles, Row, Rows, local_file
from hcache.records import content_digest
from hcache.registry import unknown_name

REPO = "zai-org/LongBench"
REVISION = "5e628be"
PROTOCOLS = ("official", "heterocache", "kvpress")

OFFICIAL_RESERVE = 500
HETEROCACHE_LENGTH = 128_500
KVPRESS_EXTRA_TOKENS = 20

_REPOSITORY = "THUDM/LongBench"
_COMMIT = "2e00731f8d0bff23dc4325161044d0ed8af94c1e"
TEMPLATES = PromptFile(
    _REPOSITORY,
    _COMMIT,
    "LongBench/config/dataset2prompt.json",
    "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
)
ANSWER_LENGTHS = PromptFile(
    _REPOSITORY,
    _COMMIT,
    "LongBench/config/dataset2maxlen.json",
    "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
)


class _Prompts(NamedTuple):
    templates: Mapping[str, Any]
    lengths: Mapping[str, Any]


_notes: dict[LongBench, list[str]] = {}
"""Of files that were read, by settings: a run of a sweep may use what an equal benchmark read."""


@BENCHMARKS.register("longbench")
@dataclass(frozen=True)
class LongBench(FileBenchmark):
    """Settings of the benchmark.

    Args:
        tasks: of the 21, and of LongBench-E's 13 by names like `qasper_e`.
        protocol: `official`, `heterocache` or `kvpress`; see the card.
    """

    tasks: tuple[str, ...] = TASKS
    protocol: str = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tasks([*TASKS, *E_TASKS])
        self.check_protocol(PROTOCOLS)

    def examples(self, tokenizer: Any | None) -> list[Example]:
        """Task by task in the order asked for, rows in the order of the files.

        Raises:
            DataError: files or prompts that are missing or broken, with what to do.
            ValueError: a Chinese score needs jieba, which is not installed.
        """
        if any(known_task(task).metric in scoring.CHINESE_METRICS for task in self.tasks):
            scoring.chinese_cutter()  # if it is missing, then before anything runs
        prompts = _Prompts(*(_mapping(file, self.prompt_dir) for file in (TEMPLATES, ANSWER_LENGTHS)))
        made: list[Example] = []
        notes: list[str] = []
        for task, path in self._paths().items():
            rows = Rows(task, skip=self.skip_bad_rows)
            found = list(islice(records(path, task, rows), self.limit))
            made += [self._example(task, record, prompts) for record in found]
            notes += self._notes_on(task, len(found), rows)
        _notes[self] = notes
        return made

    def _notes_on(self, task: str, count: int, rows: Rows) -> list[str]:
        if not count:
            raise DataError(f"{rows.place} holds no row that could be used; get it again")
        notes = []
        if rows.skipped:
            notes.append(f"{len(rows.skipped)} broken rows left out, the first: {rows.skipped[0]}")
        if self.limit is None and count != row_count(task):
            notes.append(f"{task} has {count} examples, the authors' file has {row_count(task)}")
        return notes

    def _example(self, task: str, record: Record, prompts: _Prompts) -> Example:
        known, base = known_task(task), base_task(task)
        context, question = split_prompt(_template(prompts, base), record.row)
        extra: dict[str, Any] = {"length": record.length, "language": known.language}
        if record.all_classes:
            extra["all_classes"] = record.all_classes
        return Example(
            task=task,
            id=record.id,
            context=context,
            question=question,
            answer_prefix="",
            answers=record.answers,
            max_new_tokens=self._answer_tokens(prompts, base),
            stop=() if self.protocol == "heterocache" else known.stop,
            metric=known.metric,
            extra=extra,
            chat=known.chat,
            never_empty=self.protocol == "heterocache" or (self.protocol == "official" and bool(known.stop)),
        )

    def _answer_tokens(self, prompts: _Prompts, base: str) -> int:
        tokens = prompts.lengths.get(base)
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise DataError(f"{ANSWER_LENGTHS.path}: '{base}' must be a number of tokens, it is {tokens!r}")
        return tokens + (KVPRESS_EXTRA_TOKENS if self.protocol == "kvpress" else 0)

    def longest_prompt(self, window: int) -> int | None:
        """The official 500 tokens below the window, HeteroCache's 128500, and none for kvpress."""
        if self.protocol == "kvpress":
            return None
        return HETEROCACHE_LENGTH if self.protocol == "heterocache" else window - OFFICIAL_RESERVE

    def postprocess(self, text: str, example: Example) -> str:
        """All of it: nothing is stripped, and the score takes the first line where that is the rule."""
        return text

    def score(self, example: Example | str, prediction: str, answers: Any, **extra: Any) -> float:
        """The task's metric, the best over the answers.

        Args:
            extra: `all_classes` for trec and lsht where the example itself isn't given.

        Raises:
            ValueError: an unknown task, no answers, or classes missing.
        """
        task = example if isinstance(example, str) else example.task
        if isinstance(example, Example):
            extra = example.extra
        known = known_task(task)
        if base_task(task) in scoring.FIRST_LINE_TASKS:
            prediction = scoring.first_line(prediction)
        if self.protocol == "kvpress" and task in TABLE:
            prediction = prediction.lstrip()
        try:
            return scoring.best(known.metric, prediction, texts_of(answers), extra.get("all_classes"))
        except ValueError as error:
            raise ValueError(f"benchmark 'longbench', task '{task}': {error}") from error

    # --- averages

    def aggregates(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
        """The averages that the tasks run allow, and LongBench-E's buckets of length."""
        scores = by_task(lines)
        found: dict[str, Tree] = {
            kind: [[scores[task] for task in tasks] for tasks in chosen]
            for kind in KINDS
            if (chosen := groups(scores, kind))
        }
        found.update(buckets := bucket_trees(lines))
        if len(buckets) == len(BUCKETS):
            found["mean_of_buckets"] = [buckets[name] for name in BUCKETS]
        return found

    def aggregate(self, scores: Mapping[str, float], kind: str = "official") -> float:
        """An average of tasks, on their scale.

        Args:
            kind: `official` is the mean of the means of the categories that the tasks belong to,
                `official_en` and `official_zh` the same of one language and code, `kv_papers` the plain mean
                of 16 tasks.

        Raises:
            ValueError: an unknown kind or task, no tasks, or tasks that the average needs are missing.
        """
        if kind not in KINDS:
            raise ValueError(f"benchmark 'longbench': {unknown_name('kind of average', kind, KINDS)}")
        for task in scores:
            known_task(task)
        chosen = groups(scores, kind)
        if not chosen:
            raise ValueError(f"benchmark 'longbench': {no_average(scores, kind)}")
        return fmean(fmean(scores[task] for task in tasks) for tasks in chosen)

    # --- where things are from

    def _paths(self) -> dict[str, Path]:
        """The file with each task's rows; what isn't here is got from the Hub."""
        found = {task: self._local(task) for task in self.tasks}
        missing = [task for task, path in found.items() if path is None]
        archive = self._hub().fetch(ARCHIVE) if missing else Path()
        return {task: path or archive for task, path in found.items()}

    def _local(self, task: str) -> Path | None:
        found = local_file("longbench", self.data_dir, names_of(task))
        if found is None and self.data_dir is not None:
            raise DataError(f"benchmark.data_dir={self.data_dir} has none of {', '.join(names_of(task))}")
        return found

    def _hub(self) -> HubFiles:
        return HubFiles(REPO, self.revision or REVISION)

    def identity(self) -> dict[str, Any]:
        """Digest of local files or revision on the Hub, and the commit or digest of the prompts."""
        places = {self._local(task) for task in self.tasks}
        local = [path for path in places if path is not None]
        data = [f"files {content_digest(local)}"] if local else []
        if None in places:
            data.append(f"{REPO}@{self._hub().revision}")
        return {"data": ", ".join(data), "prompts": self._prompt_source()}

    def _prompt_source(self) -> str:
        if self._pinned_prompts():
            return f"{_REPOSITORY}@{_COMMIT}"
        return f"files {content_digest(self._prompt_paths())}"

    def _pinned_prompts(self) -> bool:
        directory = self.prompt_dir
        return directory is None or all(file.matches(directory) for file in (TEMPLATES, ANSWER_LENGTHS))

    def _prompt_paths(self) -> list[Path]:
        """Where the prompts lie, or will lie once they are fetched."""
        return [file.place(self.prompt_dir) for file in (TEMPLATES, ANSWER_LENGTHS)]

    def files(self) -> list[Path]:
        """Get data and prompts; where they lie. Raises DataError where that fails."""
        for file in (TEMPLATES, ANSWER_LENGTHS):
            file.text(self.prompt_dir)
        return [*dict.fromkeys(self._paths().values()), *self._prompt_paths()]

    def notes(self) -> list[str]:
        """Prompts that are not the pinned ones, rows left out, and an average that lacks categories."""
        found = list(_notes.get(self, []))
        if not self._pinned_prompts():
            found.append(f"prompts from {self.prompt_dir} are not those of {_REPOSITORY} at {_COMMIT[:7]}")
        categories = {known_task(task).category for task in self.tasks}
        if len(categories) < len({task.category for task in TABLE.values()}):
            found.append(f"the average is over {len(categories)} of LongBench's 6 categories")
        return found


# --- prompts


def _mapping(file: PromptFile, prompt_dir: str | None) -> Mapping[str, Any]:
    content = file.json(prompt_dir)
    if not isinstance(content, dict):
        raise DataError(f"{file.path} must hold one JSON object, it holds a {type(content).__name__}")
    return content


def _template(prompts: _Prompts, base: str) -> str:
    template = prompts.templates.get(base)
    if not isinstance(template, str):
        raise DataError(
            f"{TEMPLATES.path} has no prompt for '{base}'; take the file of github.com/{_REPOSITORY}"
        )
    return template


def split_prompt(template: str, row: Row) -> tuple[str, str]:
    """`template.format(**row)` in two parts: to the end of the context, and the rest.

    Raises:
        DataError: a template that can't be read, asks for a field that no row has, or has no context.
    """
    pieces: list[str] = []
    end = None
    try:
        for literal, field, spec, conversion in Formatter().parse(template):
            pieces.append(literal)
            if field is None:
                continue
            shape = f"!{conversion}" if conversion else ""
            pieces.append(f"{{{field}{shape}:{spec}}}".format(**row))
            if field == "context":
                end = len(pieces)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{TEMPLATES.path}: the prompt {short(template)} can't be filled "
            f"({type(error).__name__}: {error}); take the file of github.com/{_REPOSITORY}"
        ) from error
    if end is None:
        raise DataError(f"{TEMPLATES.path}: the prompt {short(template)} has no {{context}}")
    return "".join(pieces[:end]), "".join(pieces[end:])
