"""`infinitebench`: twelve tasks of 100 thousand tokens and more, on books, dialogue, code, numbers and keys.

Zhang et al., arXiv 2402.13718. Rows of xinrongzhang2022/InfiniteBench, prompts of OpenBMB/InfiniteBench at
the pinned commit; the card beside this file says what protocols and rule sets are. Cutting and chat templates
are the runner's business.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from hcache.benchmarks.base import BENCHMARKS, Example, FileBenchmark, Tree, by_task
from hcache.benchmarks.prompt_files import PromptFile
from hcache.benchmarks.scoring import infinitebench as scoring
from hcache.benchmarks.source import DataError, HubFiles, Row, Rows, local_file
from hcache.records import content_digest
from hcache.registry import unknown_name

NAME = "infinitebench"
REPO, REVISION = "xinrongzhang2022/InfiniteBench", "90f0394333616266d9fe85824ceaf505093cbaa5"

OFFICIAL = PromptFile(
    "OpenBMB/InfiniteBench",
    "88b3daa6989da2fbe0077170d7a3c84c25d5ae58",
    "src/prompt.py",
    "d49a6891d6bc61522bb428d66a07b092a6bb6bc195aa0fe103eddd6bb39c7f10",
)
HETEROCACHE = PromptFile(
    "ponytaill/HeteroCache",
    "01dc7feea79756ef4dd1140158e02acf0585540b",
    "infinitebench/prompt.py",
    "5a78b7106512c63fa72ce8c3f659b635ad50c6366777d974457ad3b57d5f97cc",
)
TEMPLATES = "yarn_mistral_templates"
"""The templates of every open model."""


@dataclass(frozen=True)
class Task:
    """One of the twelve.

    Args:
        paper: its name in the paper.
        metric: name of its score.
        max_new_tokens: of an answer, in the official runs.
        long: the answer is long already, so that no protocol multiplies its tokens.
    """

    paper: str
    metric: str
    max_new_tokens: int
    long: bool = False


TABLE = {
    "passkey": Task("Retrieve.PassKey", "first_digits", 6),
    "number_string": Task("Retrieve.Number", "first_digits", 12),
    "kv_retrieval": Task("Retrieve.KV", "word", 50),
    "longbook_sum_eng": Task("En.Sum", "rouge_lsum", 1200, long=True),
    "longbook_qa_eng": Task("En.QA", "qa_f1", 40),
    "longbook_qa_chn": Task("Zh.QA", "character_f1", 40),
    "longbook_choice_eng": Task("En.MC", "choice", 40),
    "longdialogue_qa_eng": Task("En.Dia", "name", 40),
    "math_find": Task("Math.Find", "first_number", 3),
    "math_calc": Task("Math.Calc", "matching_prefix", 30000, long=True),
    "code_run": Task("Code.Run", "last_int", 5),
    "code_debug": Task("Code.Debug", "choice", 5),
}
TASKS = tuple(TABLE)
_NOT_IN_HETEROCACHE = ("kv_retrieval", "math_calc", "code_run")


@dataclass(frozen=True)
class Protocol:
    """What published runs differ in.

    Args:
        prompts: the file its templates are from.
        rules: of scoring.
        max_length: tokens of the prompt before the chat template; None for what the model holds.
        chat: prompts go into the chat template.
        factor, more: the official answer lengths are multiplied, unless they are long, and added to.
        tasks: those that are scored.
    """

    prompts: PromptFile
    rules: str
    max_length: int | None
    chat: bool
    factor: int = 1
    more: int = 0
    tasks: tuple[str, ...] = TASKS

    def max_new_tokens(self, task: str) -> int:
        """Tokens of an answer."""
        known = TABLE[task]
        return known.max_new_tokens * (1 if known.long else self.factor) + self.more


PROTOCOLS = {
    "official": Protocol(OFFICIAL, scoring.EARLY, 128 * 1024, chat=False),
    "heterocache": Protocol(
        HETEROCACHE,
        scoring.LATE,
        128_500,
        chat=True,
        factor=10,
        tasks=tuple(task for task in TASKS if task not in _NOT_IN_HETEROCACHE),
    ),
    "kvpress": Protocol(OFFICIAL, scoring.LATE, None, chat=True, more=20),
}

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


# --- rows


@dataclass(frozen=True)
class Question:
    """One row, ready to be asked.

    Args:
        context, question: the prompt in two parts.
        label: answers in their types, as the scorers take them.
        options: of a choice, else empty.
    """

    id: str
    context: str
    question: str
    label: list[Any]
    options: list[str]


class _WrongField(Exception):
    """A field of a row that is not what it should be: its name, and why."""


def sound(
    task: str, template: Template, rows: Rows, numbered: Iterator[tuple[int, Row]]
) -> Iterator[Question]:
    """Rows that are what they should be; a second row with the same id has its row number behind it.

    Raises:
        RowError: for others, unless they are counted.
    """
    contexts: dict[str, str] = {}  # questions on one book share its text
    seen: set[str] = set()
    for number, row in numbered:
        try:
            context, question = template.filled(values_of(task, template.names, row))
            options = _options(row) if task in scoring.CHOICE_TASKS else []
            label = _label(task, row, options)
        except _WrongField as wrong:
            name, reason = wrong.args
            rows.bad(number, name, reason)
            continue
        own = str(number - 1 if row.get("id") is None else row["id"])
        name = own if own not in seen else f"{own} (row {number})"
        seen.add(name)
        yield Question(name, contexts.setdefault(context, context), question, label, options)


def values_of(task: str, names: frozenset[str], row: Row) -> dict[str, str]:
    """What a template's placeholders stand for.

    Raises:
        _WrongField: a field that is needed is missing or not as it should be.
    """
    values = {"context": _text(row, "context" if "context" in row else "content")}
    if names & {"input", "question"}:
        values["input"] = values["question"] = _text(row, "input")
    if names & {"func", "func_call"}:
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", _text(row, "input"))
        if call is None:
            raise _WrongField("input", "names no call such as func_1(2)")
        values |= {"func_call": call[0], "func": call[0].split("(")[0]}
    if "prefix" in names:
        wanted = re.search(r"The .+ of", _text(row, "input"))
        if wanted is None:
            raise _WrongField("input", "does not say what number is wanted: 'The ... of'")
        values["prefix"] = f"What is {wanted[0].lower()[:-3]} in the following list?"
    choices = sorted(name for name in names if name.startswith("OPTION_"))
    if choices:
        options = _options(row)
        if len(options) < len(choices):
            raise _WrongField("options", f"must be {len(choices)} choices, there are {len(options)}")
        values |= dict(zip(choices, options, strict=False))
    return values


def _text(row: Row, name: str) -> str:
    """Raises _WrongField for what is no text."""
    if name not in row:
        raise _WrongField("context" if name == "content" else name, "is missing")
    if not isinstance(row[name], str):
        raise _WrongField(name, f"must be a text, is a {type(row[name]).__name__}")
    found: str = row[name]
    return found


def _options(row: Row) -> list[str]:
    """Choices as texts; none where there are none. Raises _WrongField for what is no list of them."""
    options = row.get("options")
    if options is None:
        return []
    if not isinstance(options, list) or not all(isinstance(part, str | int | float) for part in options):
        raise _WrongField("options", f"must be a list of texts, is {options!r:.60}")
    return [str(part) for part in options]


def _label(task: str, row: Row, options: list[str]) -> list[Any]:
    """Raises _WrongField for answers that the task can't have."""
    if row.get("answer") is None:
        raise _WrongField("answer", "is missing")
    try:
        return scoring.label(task, row["answer"], options)
    except ValueError as error:
        raise _WrongField("answer", str(error)) from error


# --- prompts

_NAMES = frozenset(
    ("context", "input", "question", "func", "func_call", "prefix", *(f"OPTION_{x}" for x in scoring.LETTERS))
)


@dataclass(frozen=True)
class Template:
    """A prompt's text with placeholders, cut where the query begins.

    Args:
        head: to the end of the context and the white space behind it.
        tail: the rest, the query.
        names: of its placeholders.
    """

    head: str
    tail: str
    names: frozenset[str]

    @classmethod
    def of(cls, text: str, where: str) -> Template:
        """Raises DataError for a text that has no context, or placeholders that nothing is known of."""
        try:
            names = frozenset(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)
        except ValueError as error:
            raise DataError(f"{where} is no template: {error}") from error
        if names - _NAMES:
            named = unknown_name("placeholder", min(names - _NAMES), _NAMES)
            raise DataError(f"{where}: {named}")
        before, context, after = text.rpartition("{context}")
        if not context:
            raise DataError(f"{where} has no {{context}}")
        tail = after.lstrip()
        return cls(before + context + after[: len(after) - len(tail)], tail, names)

    def filled(self, values: Mapping[str, str]) -> tuple[str, str]:
        """(context, question): together what `str.format` makes of the whole text."""
        return self.head.format(**values), self.tail.format(**values)
