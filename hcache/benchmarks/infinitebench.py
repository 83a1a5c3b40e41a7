"""`infinitebench`: twelve tasks of 100 thousand tokens and more, on books, dialogue, code, numbers and keys.

Zhang et al., arXiv 2402.13718. Rows of xinrongzhang2022/InfiniteBench, prompts of OpenBMB/InfiniteBench at
the pinned commit; the card beside this file says what protocols and rule sets are. Cutting and chat templates
are the runner's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from hcache.benchmarks.base import BENCHMARKS, Example, FileBenchmark, Tree, by_task
from hcache.benchmarks.infinitebench_rows import Question, sound
from hcache.benchmarks.infinitebench_tasks import PROTOCOLS, TABLE, TASKS, TEMPLATES, Protocol
from hcache.benchmarks.infinitebench_template import Template
from hcache.benchmarks.scoring import infinitebench as scoring
from hcache.benchmarks.source import DataError, HubFiles, Rows, local_file
from hcache.records import content_digest
from hcache.registry import unknown_name

NAME = "infinitebench"
REPO, REVISION = "xinrongzhang2022/InfiniteBench", "90f0394333616266d9fe85824ceaf505093cbaa5"

_skipped: dict[InfiniteBench, list[str]] = {}
"""What was wrong with rows that were left out, by the settings they were read with."""


@BENCHMARKS.register(NAME)
@dataclass(frozen=True)
class InfiniteBench(FileBenchmark):
    """Settings of the benchmark.

    Args:
        tasks: of the twelve; none named is those of the protocol, nine of heterocache and else all.
        protocol: official, heterocache or kvpress: prompts, length, answer lengths, chat template and rules.
        rules: of scoring, 2024-06 (that of the official README) or 2024-08; null is the protocol's.
        templates: which of the prompt file's sets of templates.
        model_family: gpt4 leaves out the first number of a math_calc answer, as the official code does.
    """

    protocol: str = "official"
    rules: str | None = None
    templates: str = TEMPLATES
    model_family: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_protocol(tuple(PROTOCOLS))
        object.__setattr__(self, "tasks", self.tasks or self._protocol.tasks)
        self.check_tasks(TASKS)
        object.__setattr__(self, "rules", self.rules or self._protocol.rules)
        if self.rules not in scoring.RULES:
            raise ValueError(f"benchmark.rules: {unknown_name('rules', str(self.rules), scoring.RULES)}")
        if self.model_family not in (None, "gpt4"):
            named = unknown_name("model_family", str(self.model_family), ["gpt4"])
            raise ValueError(f"benchmark.model_family: {named}; null for any other")

    @property
    def _protocol(self) -> Protocol:
        return PROTOCOLS[self.protocol]

    # --- examples

    def examples(self, tokenizer: Any | None) -> list[Example]:
        """Task by task, in the order of the files; no more of a file is read than the rows asked for.

        Raises:
            DataError: a file or the prompts can't be had or are broken, or a file has no row.
        """
        templates = self._templates()
        skipped: list[str] = []
        found = [example for task in self.tasks for example in self._of(task, templates[task], skipped)]
        _skipped[self] = skipped
        return found

    def _of(self, task: str, template: Template, skipped: list[str]) -> list[Example]:
        path = self._data(task)
        rows = Rows(str(path), self.skip_bad_rows)
        with path.open("rb") as file:
            questions = list(islice(sound(task, template, rows, rows.lines(file)), self.limit))
        skipped += rows.skipped
        if not questions:
            raise DataError(f"{path} has no row that can be run; get it again")
        return [self._example(task, question) for question in questions]

    def _example(self, task: str, question: Question) -> Example:
        extra: dict[str, Any] = {"rules": self.rules}
        if task in (*scoring.CHOICE_TASKS, "math_find", "math_calc", "code_run"):
            extra["label"] = question.label
        if task in scoring.CHOICE_TASKS:
            extra["options"] = question.options
        if self.model_family is not None:
            extra["model_family"] = self.model_family
        return Example(
            task=task,
            id=question.id,
            context=question.context,
            question=question.question,
            answer_prefix="",
            answers=tuple(str(part) for part in question.label),
            max_new_tokens=self._protocol.max_new_tokens(task),
            stop=(),
            metric=TABLE[task].metric,
            extra=extra,
            chat=self._protocol.chat,
        )

    def longest_prompt(self, window: int) -> int | None:
        """The protocol's length, before the chat template; of kvpress, which has none, the model's."""
        return self.max_length or self._protocol.max_length or window

    # --- scores

    def score(self, example: Example | str, prediction: str, answers: Any, **extra: Any) -> float:
        """Score of one prediction; the scoring module says what each task asks for.

        Args:
            answers: texts, as in a record, or in the types of the data.
            extra: `options` of a choice task; `label`, the answers in their types, which counts if it agrees
                with them; `rules` and `model_family` where they are not the settings' own.

        Raises:
            ValueError: an unknown task or rules, or answers that the task can't have.
        """
        task = example if isinstance(example, str) else example.task
        known = extra if isinstance(example, str) else {**example.extra, **extra}
        return scoring.score(
            task,
            prediction,
            typed(answers, known.get("label")),
            options=known.get("options") or (),
            rules=known.get("rules") or str(self.rules),
            model_family=known.get("model_family", self.model_family),
        )

    def aggregates(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
        """Each task by its name in the paper, and `mean`, their plain mean, which is no official number."""
        scores = by_task(lines)
        found: dict[str, Tree] = {TABLE[task].paper: values for task, values in scores.items()}
        if scores:
            found["mean"] = list(scores.values())
        return found

    def aggregate(self, scores: Mapping[str, float], kind: str = "mean") -> float:
        """The plain mean of the tasks, which HeteroCache reports too; there is no official average.

        Raises:
            ValueError: any other kind, an unknown task, or none.
        """
        if kind == "official":
            raise ValueError(f"benchmark '{NAME}' has no official average of its tasks; ask for kind='mean'")
        if kind != "mean":
            raise ValueError(f"benchmark '{NAME}': {unknown_name('kind of average', kind, ['mean'])}")
        for task in scores:
            if task not in TASKS:
                raise ValueError(f"benchmark '{NAME}': {unknown_name('task', task, TASKS)}")
        if not scores:
            raise ValueError(f"benchmark '{NAME}': no scores to average")
        return fmean(scores.values())

    # --- where things are from

    def _data(self, task: str) -> Path:
        """The file with a task's rows, got from the Hub if it isn't here."""
        return self._local(task) or self._hub.fetch(f"{task}.jsonl")

    def _local(self, task: str) -> Path | None:
        found = local_file(NAME, self.data_dir, [f"{task}.jsonl"])
        if found is None and self.data_dir is not None:
            raise DataError(
                f"benchmark.data_dir={self.data_dir} has no {task}.jsonl; put it there, or leave data_dir "
                f"null to get it from {REPO}"
            )
        return found

    @property
    def _hub(self) -> HubFiles:
        return HubFiles(REPO, self.revision or REVISION)

    def _templates(self) -> dict[str, Template]:
        """Of every task asked for. Raises DataError for one that is missing or can't be filled."""
        prompts, name = self._protocol.prompts, self.templates
        where = f"{prompts.path} of {prompts.repository}"
        literals = prompts.literals(self.prompt_dir)
        sets = {key: value for key, value in literals.items() if isinstance(value, dict)}
        if name not in sets:
            named = unknown_name("set of templates", name, sets)
            raise DataError(f"benchmark.templates: {named} in {where}")
        for task in self.tasks:
            if not isinstance(sets[name].get(task), str):
                raise DataError(f"{name} in {where} has no text for task {task}")
        return {task: Template.of(sets[name][task], f"{name}['{task}'] in {where}") for task in self.tasks}

    @property
    def _pinned_prompts(self) -> bool:
        return self.prompt_dir is None or self._protocol.prompts.matches(self.prompt_dir)

    def files(self) -> list[Path]:
        """Get rows and prompts; where they lie. Raises DataError where that fails."""
        self._protocol.prompts.text(self.prompt_dir)
        return [*(self._data(task) for task in self.tasks), self._protocol.prompts.place(self.prompt_dir)]

    def identity(self) -> dict[str, Any]:
        """Digest of local files or revision on the Hub, and the commit or digest of the prompts."""
        places = [self._local(task) for task in self.tasks]
        local = [path for path in places if path is not None]
        data = [f"files {content_digest(local)}"] if local else []
        if None in places:
            data.append(f"{REPO}@{self._hub.revision}")
        prompts = self._protocol.prompts
        own = f"{prompts.repository}@{prompts.commit}"
        return {
            "data": ", ".join(data),
            "prompts": own
            if self._pinned_prompts
            else f"files {content_digest([self._protocol.prompts.place(self.prompt_dir)])}",
        }

    def notes(self) -> list[str]:
        """The rule set, what is not official, and rows and prompts that are not as they should be."""
        prompts, protocol = self._protocol.prompts, self._protocol
        found = [
            f"scored by InfiniteBench's rules of {self.rules}; their mean over tasks is no official number"
        ]
        if self.rules != protocol.rules:
            found.append(f"the rules of protocol {self.protocol} are those of {protocol.rules}")
        if self.protocol == "kvpress":
            found.append(
                f"the prompts are all of {self.templates}; kvpress has some of the GPT-4 templates, and cuts "
                "the end of a long context where this cuts the middle of the prompt"
            )
        unscored = [task for task in self.tasks if task not in protocol.tasks]
        if unscored:
            found.append(f"protocol {self.protocol} has published no scores of {', '.join(unscored)}")
        if not self._pinned_prompts:
            found.append(f"{prompts.path} is not the one of {prompts.repository} at {prompts.commit[:7]}")
        skipped = _skipped.get(self, [])
        if skipped:
            found.append(f"{len(skipped)} broken rows were left out, the first: {skipped[0]}")
        return found


def typed(answers: Any, label: Any) -> Any:
    """The label if it says what the answers say as texts, perhaps more; else the answers."""
    if not isinstance(label, list) or not isinstance(answers, list | tuple):
        return answers
    texts = [str(part) for part in answers]
    return label if [str(part) for part in label][: len(texts)] == texts else answers
