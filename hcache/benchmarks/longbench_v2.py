"""`longbench_v2`: 503 questions with four choices over documents of 8 thousand to 2 million words.

Bai et al., arXiv 2412.15204; rows of zai-org/LongBench-v2, prompts of THUDM/LongBench at a pinned
commit. The card beside this file says what each protocol is and what is not done here (two calls, retrieval).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hcache import records
from hcache.benchmarks import prompt_files
from hcache.benchmarks.base import BENCHMARKS, Example, FileBenchmark, Tree, texts_of
from hcache.benchmarks.json_array import objects
from hcache.benchmarks.prompt_files import PromptFile
from hcache.benchmarks.scoring.longbench_v2 import (
    LETTERS,
    SUBSTRING,
    answered,
    check_extraction,
    score,
)
from hcache.benchmarks.source import DataError, HubFiles, Row, Rows, local_file
from hcache.registry import unknown_name

TASK = "longbench_v2"
QUESTIONS = 503
REPO, REVISION = "zai-org/LongBench-v2", "2b48e49"
ON_HUB, FILES = "data.json", ("data.json", "data.jsonl")
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")
DOMAINS = (
    "Single-Document QA",
    "Multi-Document QA",
    "Long In-context Learning",
    "Long-dialogue History Understanding",
    "Code Repository Understanding",
    "Long Structured Data Understanding",
)
UNANSWERED = 0.25
"""What a reply without an answer counts in the `compensated` average: one of four, as guessing would."""

ZERO_SHOT = PromptFile(
    "THUDM/LongBench",
    "2e00731f8d0bff23dc4325161044d0ed8af94c1e",
    "prompts/0shot.txt",
    "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950",
)
HETEROCACHE = PromptFile(
    "ponytaill/HeteroCache",
    "01dc7feea79756ef4dd1140158e02acf0585540b",
    "scripts/longbenchv2/pred.py",
    "9c915cde95074601cf575d5268e88d9ad9499709155f6093c5c2a6bd761ee331",
)
_HETEROCACHE_NAME = "template_0shot"


@dataclass(frozen=True)
class Protocol:
    """What published runs differ in.

    Args:
        prompts: the file its template is from.
        max_length: tokens of the prompt before the chat template; None for what the model holds.
        max_new_tokens: of an answer.
        extraction: how the answer is found in a reply.
    """

    prompts: PromptFile
    max_length: int | None
    max_new_tokens: int
    extraction: str


PROTOCOLS = {
    "official": Protocol(ZERO_SHOT, 120_000, 128, "official"),
    "heterocache": Protocol(HETEROCACHE, 128_500, 128, "heterocache"),
    "kvpress": Protocol(ZERO_SHOT, None, 16, SUBSTRING),
}

_notes: dict[LongBenchV2, list[str]] = {}
"""Of rows that were read, by settings: a run of a sweep may use what an equal benchmark read."""


@BENCHMARKS.register("longbench_v2")
@dataclass(frozen=True)
class LongBenchV2(FileBenchmark):
    """Settings of the benchmark.

    Args:
        protocol: official, heterocache or kvpress.
        difficulties: of easy and hard; none named is both.
        lengths: of short (up to 32 thousand words), medium and long (over 128 thousand); none named is all.
        domains: of the six; none named is all.
        extraction: official, heterocache or kvpress; null is the protocol's own.
        model_family: deepseek where the heterocache extraction is to look behind a model's thoughts.
        max_new_tokens: null is the protocol's own; models that think need thousands.
    """

    tasks: tuple[str, ...] = (TASK,)
    protocol: str = "official"
    difficulties: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    extraction: str | None = None
    model_family: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tasks((TASK,))
        self.check_protocol(tuple(PROTOCOLS))
        check_extraction(self._extraction)
        for name, known in (("difficulties", DIFFICULTIES), ("lengths", LENGTHS), ("domains", DOMAINS)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"benchmark.{name}: {unknown_name('value', value, known)}")
        if self.model_family not in (None, "deepseek"):
            raise ValueError(
                f"benchmark.model_family: {unknown_name('family', str(self.model_family), ['deepseek'])}; "
                "null for any other"
            )
        if self.model_family is not None and self._extraction != "heterocache":
            raise ValueError(
                f"benchmark.model_family={self.model_family} has no effect on extraction "
                f"{self._extraction}; set benchmark.extraction=heterocache, or leave it null"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"benchmark.max_new_tokens={self.max_new_tokens} must be at least 1, or null")

    @property
    def _rules(self) -> Protocol:
        return PROTOCOLS[self.protocol]

    @property
    def _extraction(self) -> str:
        return self._rules.extraction if self.extraction is None else self.extraction

    # --- examples

    def examples(self, tokenizer: Any | None) -> list[Example]:
        """In the file's order; with a limit no more of the file is read than the rows asked for.

        Raises:
            DataError: file or prompts can't be had or are broken, or no row is left.
        """
        template, path = self._template(), self._data()
        rows = Rows(str(path), self.skip_bad_rows)
        found = [self._example(template, row) for row in self._chosen(path, rows)]
        if not found:
            kept = f"difficulties {self.difficulties}, lengths {self.lengths}, domains {self.domains}"
            raise DataError(f"{path} has no row to run with {kept}; () takes all")
        _notes[self] = self._notes_on(len(found), rows)
        return found

    def _notes_on(self, count: int, rows: Rows) -> list[str]:
        found = []
        if rows.skipped:
            found.append(f"broken rows left out: {len(rows.skipped)}, the first: {rows.skipped[0]}")
        whole = self.limit is None and not (self.difficulties or self.lengths or self.domains)
        if whole and count != QUESTIONS:
            found.append(f"there are {count} questions, the authors' file has {QUESTIONS}")
        return found

    def _example(self, template: Template, row: Row) -> Example:
        context, question = template.filled(row)
        extra = {name: row[name] for name in ("difficulty", "length", "domain")}
        extra["extraction"] = self._extraction
        if self.model_family is not None:
            extra["model_family"] = self.model_family
        return Example(
            task=TASK,
            id=row["_id"],
            context=context,
            question=question,
            answer_prefix="",
            answers=(row["answer"],),
            max_new_tokens=self.max_new_tokens or self._rules.max_new_tokens,
            stop=(),
            metric="accuracy",
            extra=extra,
            chat=True,
        )

    def _chosen(self, path: Path, rows: Rows) -> Iterator[Row]:
        """The rows of the file that are run; what is wrong with others is in `rows`."""
        with path.open("rb") as file:
            numbered = rows.lines(file) if path.suffix == ".jsonl" else objects(rows, file)
            yield from islice((row for row in sound(rows, numbered) if self._wants(row)), self.limit)

    def _wants(self, row: Row) -> bool:
        wanted = (("difficulty", self.difficulties), ("length", self.lengths), ("domain", self.domains))
        return all(not values or row[name] in values for name, values in wanted)

    def _template(self) -> Template:
        prompts = self._rules.prompts
        if prompts is HETEROCACHE:
            text = prompts.literals(self.prompt_dir).get(_HETEROCACHE_NAME)
        else:
            text = prompts.text(self.prompt_dir)
        if not isinstance(text, str):
            raise DataError(f"{prompts.path} of {prompts.repository} has no text {_HETEROCACHE_NAME}")
        if self.protocol == "kvpress":
            text = "".join(text.rpartition('"')[::2])  # its format line has lost the closing quote
        return Template.of(text, prompts)

    # --- files

    def _data(self) -> Path:
        return local_file(TASK, self.data_dir, FILES) or self._hub.fetch(ON_HUB)

    @property
    def _hub(self) -> HubFiles:
        return HubFiles(REPO, self.revision or REVISION)

    @property
    def _pinned_prompts(self) -> bool:
        return self.prompt_dir is None or self._rules.prompts.matches(self.prompt_dir)

    def files(self) -> list[Path]:
        """The rows and the protocol's template."""
        prompts = self._rules.prompts
        prompts.text(self.prompt_dir)
        cached = prompt_files.CACHE / "prompts" / prompts.repository / prompts.commit
        root = cached if self.prompt_dir is None else Path(self.prompt_dir).expanduser()
        return [self._data(), root / prompts.path]

    def identity(self) -> dict[str, Any]:
        """Of the rows, a digest of a local file or id and revision on the Hub; whose prompts."""
        local, prompts = local_file(TASK, self.data_dir, FILES), self._rules.prompts
        own = f"{prompts.repository}@{prompts.commit}"
        return {
            "data": f"{REPO}@{self._hub.revision}" if local is None else records.content_digest([local]),
            "prompts": own if self._pinned_prompts else records.text_digest(prompts.text(self.prompt_dir)),
        }

    def notes(self) -> list[str]:
        """Rows that were left out or are too few, prompts and extraction of one's own."""
        found = list(_notes.get(self, []))
        prompts = self._rules.prompts
        if not self._pinned_prompts:
            found.append(f"{prompts.path} is not the one of {prompts.repository} at {prompts.commit}")
        if self._extraction != self._rules.extraction:
            found.append(f"answers are extracted as by {self._extraction}, not as by {self.protocol}")
        return found

    def longest_prompt(self, window: int) -> int | None:
        """The protocol's length, before the chat template; of kvpress, which has none, the model's."""
        return self.max_length or self._rules.max_length or window

    # --- scores

    def score(self, example: Example | str, prediction: str, answers: Any, **extra: Any) -> float:
        """1 if the reply chooses the right letter, else 0; a reply without an answer is wrong.

        Args:
            answers: the right letter.
            extra: `extraction` and `model_family`, where they are not the settings' own.

        Raises:
            ValueError: an unknown task or extraction, or answers that are not one letter.
        """
        task = example if isinstance(example, str) else example.task
        if task != TASK:
            raise ValueError(f"benchmark '{TASK}': {unknown_name('task', task, [TASK])}")
        right = texts_of(answers)
        if len(right) != 1:
            raise ValueError(f"benchmark '{TASK}': there is one right answer, got {list(right)}")
        known = extra if isinstance(example, str) else {**example.extra, **extra}
        return score(prediction, right[0], *self._reading(known))

    def _reading(self, known: Mapping[str, Any]) -> tuple[str, str | None]:
        """(extraction, model family): what a line or an example says, else the settings'."""
        if known.get("extraction") is None:
            return self._extraction, known.get("model_family", self.model_family)
        return known["extraction"], known.get("model_family")

    def aggregates(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
        """Accuracy of all, by difficulty, by length and by domain, as in the official table and beyond it.

        `compensated` is that of all with a quarter for each reply without an answer (an official switch), and
        `no_answer` the share of such replies, which is no accuracy.
        """
        if not lines:
            return {}
        found: dict[str, list[float]] = {"overall": [line["score"] for line in lines]}
        for key, names in (("difficulty", DIFFICULTIES), ("length", LENGTHS), ("domain", DOMAINS)):
            for name in dict.fromkeys((*names, *(line[key] for line in lines))):
                found[name] = [line["score"] for line in lines if line[key] == name]
        silent = [not answered(line["prediction"], *self._reading(line)) for line in lines]
        pairs = list(zip(lines, silent, strict=True))
        found["compensated"] = [UNANSWERED if quiet else line["score"] for line, quiet in pairs]
        found["no_answer"] = [float(quiet) for quiet in silent]
        return {name: scores for name, scores in found.items() if scores}

    def aggregate(self, scores: Mapping[str, float], kind: str = "official") -> float:
        """The score of the one task: accuracy of all questions. Raises ValueError for others."""
        for name in scores:
            if name != TASK:
                raise ValueError(f"benchmark '{TASK}': {unknown_name('task', name, [TASK])}")
        return super().aggregate(scores, kind)


# --- rows

_TEXTS = ("_id", "domain", "difficulty", "length", "question", "context", "answer")
_CHOICES = tuple(f"choice_{letter}" for letter in LETTERS)
_ALLOWED = {"difficulty": DIFFICULTIES, "length": LENGTHS, "answer": LETTERS}


def sound(rows: Rows, numbered: Iterator[tuple[int, Row]]) -> Iterator[Row]:
    """Rows that are what they should be. Raises RowError for others, or counts them."""
    seen: set[str] = set()
    for number, row in numbered:
        fault = _fault(row)
        if fault is None and row["_id"] in seen:
            fault = "_id", f"'{row['_id']}' is that of an earlier row too"
        if fault is not None:
            rows.bad(number, *fault)
            continue
        seen.add(row["_id"])
        yield row


def _fault(row: Row) -> tuple[str, str] | None:
    """The first field that is wrong, and how."""
    for name in (*_TEXTS, *_CHOICES):
        value = row.get(name)
        if value is None:
            return name, "is missing"
        if not isinstance(value, str):
            return name, f"must be a text, is a {type(value).__name__}"
        if name in _TEXTS and not value.strip():
            return name, "is blank"
        if value not in _ALLOWED.get(name, (value,)):
            return name, f"is {value[:40]!r}, must be one of {', '.join(_ALLOWED[name])}"
    return None


# --- prompts


@dataclass(frozen=True)
class Template:
    """A prompt's text around its placeholders.

    Args:
        pieces: text and names of placeholders by turns, text first and last.
    """

    pieces: tuple[str, ...]

    @classmethod
    def of(cls, text: str, source: PromptFile) -> Template:
        """Raises DataError for a text that lacks a placeholder."""
        pieces = tuple(re.split(r"\$(DOC|Q|C_[A-D])\$", text))
        missing = [name for name in ("DOC", "Q", *(f"C_{x}" for x in LETTERS)) if name not in pieces[1::2]]
        if missing:
            raise DataError(f"{source.path} of {source.repository} has no ${missing[0]}$")
        return cls(pieces)

    def filled(self, row: Row) -> tuple[str, str]:
        """(context up to and with the document, the rest), every value without space around it.

        A value is never searched for placeholders: a document may contain `$Q$`.
        """
        values = {"DOC": row["context"], "Q": row["question"]}
        values |= {f"C_{letter}": row[f"choice_{letter}"] for letter in LETTERS}
        parts = [values[piece].strip() if place % 2 else piece for place, piece in enumerate(self.pieces)]
        places = [place for place in range(1, len(self.pieces), 2) if self.pieces[place] == "DOC"]
        return "".join(parts[: places[-1] + 1]), "".join(parts[places[-1] + 1 :])
