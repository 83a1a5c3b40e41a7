"""`ruler`: needles, variables, word counts and questions in prompts of any length, made for any tokenizer.

Hsieh et al., arXiv 2404.06654; prompts of NVIDIA/RULER at a pinned commit, generators our own
(ruler_tasks.py), or the prepared rows of simonjegou/ruler (ruler_hub.py). The card beside this file says what
each task needs and where this differs from RULER.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from hcache import records
from hcache.benchmarks import ruler_hub
from hcache.benchmarks.base import BENCHMARKS, Example, FileBenchmark, Tree, texts_of
from hcache.benchmarks.ruler_assets import ENGLISH, ESSAYS, Asset, Assets, assets_of, where
from hcache.benchmarks.ruler_fit import Maker, Room, best_size, sample
from hcache.benchmarks.ruler_tasks import (
    NEEDLE_TASKS,
    CommonWords,
    Documents,
    FrequentWords,
    Needles,
    VariableTracking,
)
from hcache.benchmarks.ruler_template import PROMPTS, Parts, Template, read_templates
from hcache.benchmarks.ruler_words import sentence_splitter
from hcache.benchmarks.scoring.ruler import preprocessed, string_match_all, string_match_part
from hcache.benchmarks.source import DataError, Rows, local_file
from hcache.registry import unknown_name

log = logging.getLogger(__name__)

FAMILIES = {
    **dict.fromkeys(NEEDLE_TASKS, "niah"),
    "vt": "variable_tracking",
    "cwe": "common_words_extraction",
    "fwe": "freq_words_extraction",
    "qa_1": "qa",
    "qa_2": "qa",
}
"""Every task, and what its template is called."""

TASKS = tuple(FAMILIES)
WITHOUT_FILES = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
OFFICIAL_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
SHORTEST = 512

# What replaces control characters in predictions.
PROTOCOLS = {"official": "\n", "kvpress": ""}
SOURCES = ("generated", "hub")
KINDS = ("official", "wavg_inc", "wavg_dec")


@BENCHMARKS.register("ruler")
@dataclass(frozen=True)
class Ruler(FileBenchmark):
    """Settings of the benchmark.

    Args:
        tasks: of the 13; with each length one task of the results, `vt_4096`.
        protocol: official, or kvpress, which takes control characters out of predictions.
        lengths: of prompt and answer in tokens of the model's tokenizer, its chat template not counted.
        examples_per_task: of each task and length. Raising it adds examples and changes none.
        seed: another seed, other examples.
        source: generated, or hub for the rows of simonjegou/ruler.
    """

    tasks: tuple[str, ...] = WITHOUT_FILES
    protocol: str = "official"
    lengths: tuple[int, ...] = (4096,)
    examples_per_task: int = 500
    seed: int = 42
    source: str = "generated"

    _said: ClassVar[list[str]]  # an instance's own: what making its examples had to be noted

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "_said", [])
        self.check_tasks(TASKS)
        self.check_protocol(tuple(PROTOCOLS))
        if self.source not in SOURCES:
            raise ValueError(f"benchmark.source: {unknown_name('source', self.source, SOURCES)}")
        if not self.lengths or len(set(self.lengths)) < len(self.lengths) or min(self.lengths) < SHORTEST:
            allowed = f"must name one or more different lengths, each at least {SHORTEST} tokens"
            raise ValueError(f"benchmark.lengths={list(self.lengths)} {allowed}")
        if self.examples_per_task < 1:
            raise ValueError(f"benchmark.examples_per_task={self.examples_per_task} must be at least 1")
        self._check_source()

    def _check_source(self) -> None:
        """Raise ValueError for a setting that the source makes no use of."""
        unused = ("revision", "skip_bad_rows") if self.source == "generated" else ("seed", "prompt_dir")
        defaults = {"revision": None, "skip_bad_rows": False, "seed": 42, "prompt_dir": None}
        for name in unused:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"benchmark.{name}={getattr(self, name)} has no effect on source={self.source}; "
                    f"leave it at {defaults[name]}, or set benchmark.source"
                )

    # --- examples

    def examples(self, tokenizer: Any | None) -> list[Example]:
        """Task by task, length by length; the same for the same settings, files and tokenizer.

        Raises:
            DataError: a file that a task needs isn't there or is broken.
            ValueError: a length too short for a task.
        """
        count = self.examples_per_task if self.limit is None else min(self.limit, self.examples_per_task)
        if self.source == "hub":
            return self._from_hub(count)
        found = self._required()
        templates = self._templates()
        assets = Assets(found)
        return [
            example
            for task in self.tasks
            for length in self.lengths
            for example in self._generated(task, length, count, templates, assets, tokenizer)
        ]

    def _generated(
        self,
        task: str,
        length: int,
        count: int,
        templates: Mapping[str, Template],
        assets: Assets,
        tokenizer: Any | None,
    ) -> Iterator[Example]:
        template = templates[FAMILIES[task]]
        room = Room(lambda text: _tokens(tokenizer, text), length, template.new_tokens, task)
        maker = self._maker(task, template, room, assets)
        size = best_size(maker, room)
        self._check_size(task, maker, size, room)
        for index in range(count):
            parts = sample(maker, room, size, index)
            yield self._example(
                task, length, index, parts, template.new_tokens, {"tokens": room.taken(parts)}
            )

    def _maker(self, task: str, template: Template, room: Room, assets: Assets) -> Maker:
        if task in NEEDLE_TASKS:
            needle_task = NEEDLE_TASKS[task]
            essays = assets.essays() if needle_task.haystack == "essay" else None
            return Needles(needle_task, template, room.length, self.seed, essays)
        if task == "vt":
            maker = VariableTracking(template, room.length, self.seed, room)
            if maker.example_is_long:
                self._note(
                    f"vt: the worked example takes more than its {maker.example_tokens} tokens in this "
                    "tokenizer; the smallest possible one is used"
                )
            return maker
        if task == "cwe":
            return CommonWords(template, room.length, self.seed, assets.english_words())
        if task == "fwe":
            return FrequentWords(template, room.length, self.seed)
        return Documents(template, self.seed, assets.questions(task))

    def _check_size(self, task: str, maker: Maker, size: int, room: Room) -> None:
        """Note where a task has no more to fill a length with. Raises DataError where a file would help."""
        if size != maker.most:
            return
        if task == "cwe" and ENGLISH not in self._found():
            raise DataError(
                f"benchmark.tasks: cwe at {room.length} tokens needs more than {size} different words: "
                f"{where(ENGLISH)}, or leave the length out"
            )
        self._note(
            f"{task}: all {size} words or documents that there are fill less than {room.length} tokens"
        )

    def _note(self, text: str) -> None:
        if text not in self._said:
            log.warning("%s", text)
            self._said.append(text)

    def _example(
        self,
        task: str,
        length: int,
        index: int,
        parts: Parts,
        new_tokens: int,
        extra: Mapping[str, Any] | None = None,
    ) -> Example:
        return Example(
            task=f"{task}_{length}",
            id=str(index),
            context=parts.context,
            question=parts.question,
            answer_prefix=parts.answer_prefix,
            answers=parts.answers,
            max_new_tokens=new_tokens,
            stop=(),
            metric=_metric(task),
            extra={"length": length, **(extra or {})},
            chat=True,
        )

    def _from_hub(self, count: int) -> list[Example]:
        by_length = {length: self._hub_rows(length, count) for length in self.lengths}
        return [
            self._example(task, length, index, _parts(row), row["max_new_tokens"])
            for task in self.tasks
            for length in self.lengths
            for index, row in enumerate(by_length[length][task])
        ]

    def _hub_rows(self, length: int, count: int) -> dict[str, list[dict[str, Any]]]:
        paths = self._hub_files(length)
        rows = Rows(str(paths[0]), self.skip_bad_rows)
        found = ruler_hub.chosen(ruler_hub.numbered(paths, rows), rows, self.tasks, count)
        if rows.skipped:
            self._note(f"{len(rows.skipped)} broken rows were left out: {'; '.join(rows.skipped)}")
        return found

    # --- files

    def _hub_files(self, length: int) -> list[Path]:
        local = ruler_hub.local_rows(self.data_dir, length)
        return ruler_hub.fetched_rows(self.revision, length) if local is None else [local]

    def _templates(self) -> dict[str, Template]:
        templates = read_templates(self.prompt_dir)
        for task in self.tasks:
            if FAMILIES[task] not in templates:
                raise DataError(f"{PROMPTS.path} of {PROMPTS.repository}: TASKS lacks {FAMILIES[task]!r}")
        return templates

    def _found(self) -> dict[Asset, Path]:
        """The files that are there, of those that the tasks can use."""
        wanted = dict.fromkeys(asset for task in self.tasks for asset in assets_of(task))
        places = {asset: local_file("ruler", self.data_dir, asset.names) for asset in wanted}
        return {asset: path for asset, path in places.items() if path is not None}

    def _required(self) -> dict[Asset, Path]:
        """As `_found`. Raises DataError where one that a task can't do without isn't there."""
        found = self._found()
        for task in self.tasks:
            for asset in assets_of(task):
                if asset is not ENGLISH and asset not in found:
                    raise DataError(
                        f"benchmark.tasks: {task} needs {asset.what}: {where(asset)}, or leave the task out"
                    )
        return found

    @property
    def _pinned_prompts(self) -> bool:
        return self.prompt_dir is None or PROMPTS.matches(self.prompt_dir)

    def files(self) -> list[Path]:
        """The templates and the files of the tasks, or the rows of the Hub."""
        if self.source == "hub":
            return [path for length in self.lengths for path in self._hub_files(length)]
        self._templates()
        return [PROMPTS.place(self.prompt_dir), *self._required().values()]

    def identity(self) -> dict[str, Any]:
        """Of the rows, digests of local files, or id and commit on the Hub; else prompts, words, files."""
        if self.source == "hub":
            local = {length: ruler_hub.local_rows(self.data_dir, length) for length in self.lengths}
            return {"data": {str(length): self._rows_name(length, path) for length, path in local.items()}}
        from importlib.metadata import version

        own = f"{PROMPTS.repository}@{PROMPTS.commit}"
        found: dict[str, Any] = {
            "prompts": own if self._pinned_prompts else records.text_digest(PROMPTS.text(self.prompt_dir)),
            "words": f"wonderwords {version('wonderwords')}",
            "data": {path.name: records.content_digest([path]) for path in self._found().values()},
        }
        if self._needs_essays:
            found["sentences"] = "by rule" if sentence_splitter() is None else f"nltk {version('nltk')}"
        return found

    def _rows_name(self, length: int, local: Path | None) -> str:
        if local is not None:
            return records.content_digest([local])
        commit = ruler_hub.fetched_rows(self.revision, length)[0].parent.parent.name
        return f"{ruler_hub.REPO}@{commit}"

    @property
    def _needs_essays(self) -> bool:
        return any(ESSAYS in assets_of(task) for task in self.tasks)

    def notes(self) -> list[str]:
        """Prompts and sentences that are not RULER's, rows left out, texts that ran out."""
        found = list(self._said)
        if self.source == "hub":
            return found
        if not self._pinned_prompts:
            found.append(f"{PROMPTS.path} is not the one of {PROMPTS.repository} at {PROMPTS.commit}")
        if self._needs_essays and sentence_splitter() is None:
            found.append(
                "needles in essays lie between sentences found by rule: nltk's punkt_tab data isn't there"
            )
        return found

    def longest_prompt(self, window: int) -> int | None:
        """None: prompts are made to length."""
        return self.max_length

    # --- scores

    def postprocess(self, text: str, example: Example) -> str:
        """Control characters replaced as the protocol says, no outer space."""
        return preprocessed(text, PROTOCOLS[self.protocol])

    def score(self, example: Example | str, prediction: str, answers: Any, **extra: Any) -> float:
        """Of the needles, variables and words the share that is said; of a question, 1 if any answer is.

        Raises:
            ValueError: an unknown task, or no answer.
        """
        task, _ = split_name(example if isinstance(example, str) else example.task)
        text = preprocessed(prediction, PROTOCOLS[self.protocol])
        rule = string_match_part if _metric(task) == "string_match_part" else string_match_all
        return rule(text, texts_of(answers))

    def aggregates(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
        """Each length's mean of its tasks; `empty_predictions` is the share of those, which is no score."""
        by_length: dict[int, dict[str, list[float]]] = {}
        for line in lines:
            by_length.setdefault(line["length"], {}).setdefault(line["task"], []).append(line["score"])
        found: dict[str, Tree] = {
            f"mean_{length}": list(by_length[length].values()) for length in sorted(by_length)
        }
        said = [line["prediction"] for line in lines if "prediction" in line]
        if said:
            found["empty_predictions"] = [float(not text.strip()) for text in said]
        return found

    def aggregate(self, scores: Mapping[str, float], kind: str = "official") -> float:
        """An average of the lengths' means of their tasks.

        Args:
            kind: official, the plain mean; wavg_inc and wavg_dec weigh the six official lengths from 1 to 6
                and from 6 to 1.

        Raises:
            ValueError: no score, an unknown kind or task, or not exactly the six lengths for a weighted one.
        """
        if kind not in KINDS:
            raise ValueError(f"benchmark 'ruler': {unknown_name('kind of average', kind, KINDS)}")
        by_length: dict[int | None, list[float]] = {}
        for name, value in scores.items():
            by_length.setdefault(split_name(name)[1], []).append(value)
        if not by_length:
            raise ValueError("benchmark 'ruler': no scores to average")
        means = {length: fmean(values) for length, values in by_length.items()}
        if kind == "official":
            return fmean(means.values())
        if set(means) != set(OFFICIAL_LENGTHS):
            raise ValueError(
                f"benchmark 'ruler': {kind} needs the lengths {', '.join(map(str, OFFICIAL_LENGTHS))}; "
                f"got {', '.join(str(length) for length in means)}"
            )
        weights = range(1, 7) if kind == "wavg_inc" else range(6, 0, -1)
        return fmean([means[length] for length in OFFICIAL_LENGTHS], weights)


def _metric(task: str) -> str:
    return "string_match_part" if FAMILIES[task] == "qa" else "string_match_all"


def split_name(name: str) -> tuple[str, int | None]:
    """Task and length of a row of the results, None for a task alone. Raises ValueError for others."""
    if name in FAMILIES:
        return name, None
    task, _, length = name.rpartition("_")
    if task in FAMILIES and length.isdecimal():
        return task, int(length)
    raise ValueError(
        f"benchmark 'ruler': {unknown_name('task', task if length.isdecimal() else name, TASKS)}"
    )


def _parts(row: Mapping[str, Any]) -> Parts:
    answers = ruler_hub.answers_of(row["answer"])
    return Parts(row["context"], row["question"], row["answer_prefix"], answers)


def _tokens(tokenizer: Any | None, text: str) -> int:
    """Tokens of a text without special ones; bytes without a tokenizer."""
    if tokenizer is None:
        return len(text.encode())
    return len(tokenizer.encode(text, add_special_tokens=False))
