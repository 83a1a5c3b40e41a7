"""`longbench_v2`: 503 questions with four choices over documents of 8 thousand to 2 million words.

Bai et al., arXiv 2412.15204; rows of zai-org/LongBench-v2, prompts of THUDM/LongBench at a pinned
commit. The card beside this file says what each protocol and mode is and what is not done here (retrieval).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hcache import records
from hcache.benchmarks.base import BENCHMARKS, Example, FileBenchmark, Second, Tree, texts_of
from hcache.benchmarks.json_array import objects
from hcache.benchmarks.longbench_v2_prompts import (
    MODES,
    OFFICIAL,
    PLAIN,
    PROTOCOLS,
    Protocol,
    Template,
    around_reply,
    files_of,
    first_template,
    second_template,
    values_of,
)
from hcache.benchmarks.longbench_v2_rows import DIFFICULTIES, DOMAINS, LENGTHS, QUESTIONS, sound
from hcache.benchmarks.prompt_files import PromptFile
from hcache.benchmarks.scoring.longbench_v2 import answered, check_extraction, score
from hcache.benchmarks.source import DataError, HubFiles, Row, Rows, local_file
from hcache.registry import unknown_name

TASK = "longbench_v2"
REPO, REVISION = "zai-org/LongBench-v2", "2b48e49"
ON_HUB, FILES = "data.json", ("data.json", "data.jsonl")
UNANSWERED = 0.25
"""What a reply without an answer counts in the `compensated` average: one of four, as guessing would."""

_notes: dict[LongBenchV2, list[str]] = {}
"""Of rows that were read, by settings: a run of a sweep may use what an equal benchmark read."""


@BENCHMARKS.register("longbench_v2")
@dataclass(frozen=True)
class LongBenchV2(FileBenchmark):
    """Settings of the benchmark.

    Args:
        protocol: official, heterocache or kvpress.
        mode: 0shot asks for the letter; cot for thoughts, and then, by a second prompt without the document,
            for the letter; no_context without the document. Other protocols than official have 0shot alone.
        difficulties: of easy and hard; none named is both.
        lengths: of short (up to 32 thousand words), medium and long (over 128 thousand); none named is all.
        domains: of the six; none named is all.
        extraction: official, heterocache or kvpress; null is the protocol's own.
        model_family: deepseek where the heterocache extraction is to look behind a model's thoughts.
        max_new_tokens: of the reply, in mode cot of the first; null is the protocol's own. Models that think
            need thousands.
    """

    tasks: tuple[str, ...] = (TASK,)
    protocol: str = OFFICIAL
    mode: str = PLAIN
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
        self._check_mode()
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

    def _check_mode(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"benchmark.mode: {unknown_name('mode', self.mode, MODES)}")
        if self.mode != PLAIN and self.protocol != OFFICIAL:
            raise ValueError(
                f"benchmark.mode={self.mode} is of the official code alone; set benchmark.protocol=official, "
                f"or benchmark.mode={PLAIN}"
            )
        if self.mode == "no_context" and not self.query_aware:
            raise ValueError(
                "benchmark.query_aware=false would leave benchmark.mode=no_context nothing to compress; "
                "leave it true"
            )

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
        template = first_template(self.protocol, self.mode, self.prompt_dir)
        second, path = second_template(self.mode, self.prompt_dir), self._data()
        rows = Rows(str(path), self.skip_bad_rows)
        found = [self._example(template, second, row) for row in self._chosen(path, rows)]
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

    def _example(self, template: Template, second: Template | None, row: Row) -> Example:
        context, question = template.filled(values_of(row), "DOC")
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
            max_new_tokens=self.max_new_tokens
            or MODES[self.mode].max_new_tokens
            or self._rules.max_new_tokens,
            stop=(),
            metric="accuracy",
            extra=extra,
            chat=True,
            second=None if second is None else Second(*around_reply(second, row), self._rules.max_new_tokens),
        )

    def _chosen(self, path: Path, rows: Rows) -> Iterator[Row]:
        """The rows of the file that are run; what is wrong with others is in `rows`."""
        with path.open("rb") as file:
            numbered = rows.lines(file) if path.suffix == ".jsonl" else objects(rows, file)
            yield from islice((row for row in sound(rows, numbered) if self._wants(row)), self.limit)

    def _wants(self, row: Row) -> bool:
        wanted = (("difficulty", self.difficulties), ("length", self.lengths), ("domain", self.domains))
        return all(not values or row[name] in values for name, values in wanted)

    # --- files

    def _data(self) -> Path:
        return local_file(TASK, self.data_dir, FILES) or self._hub.fetch(ON_HUB)

    @property
    def _hub(self) -> HubFiles:
        return HubFiles(REPO, self.revision or REVISION)

    @property
    def _prompts(self) -> list[PromptFile]:
        return files_of(self.protocol, self.mode)

    @property
    def _own_prompts(self) -> list[PromptFile]:
        """Those that are not known to be the pinned ones."""
        directory = self.prompt_dir
        return [file for file in self._prompts if directory is not None and not file.matches(directory)]

    def files(self) -> list[Path]:
        """The rows and the templates."""
        for file in self._prompts:
            file.text(self.prompt_dir)
        return [self._data(), *(file.place(self.prompt_dir) for file in self._prompts)]

    def identity(self) -> dict[str, Any]:
        """Of the rows, a digest of a local file or id and revision on the Hub; whose prompts."""
        local, pinned = local_file(TASK, self.data_dir, FILES), self._prompts[0]
        texts = [file.text(self.prompt_dir) for file in self._prompts] if self._own_prompts else []
        own = records.text_digest("".join(texts))
        return {
            "data": f"{REPO}@{self._hub.revision}" if local is None else records.content_digest([local]),
            "prompts": own if texts else f"{pinned.repository}@{pinned.commit}",
        }

    def notes(self) -> list[str]:
        """Rows that were left out or are too few, prompts and extraction of one's own, the mode."""
        found = list(_notes.get(self, []))
        found += [
            f"{file.path} is not {'' if file.sha256 else 'known to be '}the one of {file.repository} at "
            f"{file.commit}"
            for file in self._own_prompts
        ]
        if self._extraction != self._rules.extraction:
            found.append(f"answers are extracted as by {self._extraction}, not as by {self.protocol}")
        if MODES[self.mode].then is not None:
            found.append("answers are those to a second prompt; times, tokens and bytes are of the first")
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
