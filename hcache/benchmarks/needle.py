"""`needle`: one sentence hidden in a long text, at every depth of several lengths, and a question about it.

After Kamradt's "Needle In A Haystack" (github.com/gkamradt/LLMTest_NeedleInAHaystack at 7b90d28): the text is
cut to the length, the needle goes to a depth in percent of its tokens and back to the last sentence end. The
score is the one that papers on KV caches plot. Sentence, wording and, unless a haystack is named, the text
are our own; the card beside this file says how to set those of a paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from random import Random
from typing import Any

from hcache import records
from hcache.benchmarks.base import BENCHMARKS, Benchmark, Example, Tree, texts_of
from hcache.benchmarks.needle_text import Files, Prose, Tokens, fitted, insertion
from hcache.benchmarks.scoring.needle import SCORES
from hcache.benchmarks.source import DataError
from hcache.registry import unknown_name
from hcache.tiny.text import Keys, new_value

PROTOCOLS = ("plain", "chat")
FIELDS = ("{key}", "{value}")

NEEDLE = "\nThe night porter of the Hotel Meridian keeps the spare key in a blue teapot under the piano.\n"
QUESTION = "Question: Where does the night porter of the Hotel Meridian keep the spare key?\nAnswer:"
ANSWER = "in a blue teapot under the piano."
PREFIX = "Read this text. A question about one of its sentences comes at the end.\n\n"


@BENCHMARKS.register("needle")
@dataclass(frozen=True)
class Needle(Benchmark):
    """Settings of the benchmark. The prompt is prefix + text with the needle + suffix + question.

    `{key}` and `{value}` in needle, question and answer are four letters and four digits, others in every
    example.

    Args:
        tasks: of the lengths' tasks, `needle_4096`; none named means all.
        lengths: of the whole prompt in tokens of the model's tokenizer.
        depths: in percent of the text: 0 is its start, 100 its end.
        examples_per_depth: of each length and depth. Raising it adds examples and changes none.
        seed: another seed, other generated text, keys and values.
        haystack: a text file, or a directory whose *.txt files are joined in the order of their names; null
            generates prose, another for every example.
        needle: inserted as it is, line breaks included.
        question: ends the prompt; it is what `query_aware=false` holds back.
        answer: words that a right response has.
        prefix, suffix: before and after the text.
        system: the system message of protocol `chat`.
        metric: `recall` of the answer's words, or `rouge1` against the needle.
        max_new_tokens: of a response, which ends at a line break too.
        buffer_tokens: of the length, kept free for all but text and needle; null keeps free what they take.
        protocol: `plain`, or `chat` for the model's chat template (whose own tokens aren't counted).
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)
    examples_per_depth: int = 1
    seed: int = 0
    haystack: str | None = None
    needle: str = NEEDLE
    question: str = QUESTION
    answer: str = ANSWER
    prefix: str = PREFIX
    suffix: str = "\n\n"
    system: str | None = None
    metric: str = "recall"
    max_new_tokens: int = 30
    buffer_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "depths", tuple(float(depth) for depth in self.depths))
        self._check_grid()
        if self.tasks:
            self.check_tasks([_task(length) for length in self.lengths])
        for kind, known in (("protocol", PROTOCOLS), ("metric", tuple(SCORES))):
            if getattr(self, kind) not in known:
                raise ValueError(f"benchmark.{kind}: {unknown_name(kind, getattr(self, kind), known)}")
        self._check_texts()

    def _check_grid(self) -> None:
        if not self.lengths or len(set(self.lengths)) < len(self.lengths) or min(self.lengths) < 1:
            raise ValueError(
                f"benchmark.lengths={list(self.lengths)} must name one or more different lengths in tokens"
            )
        unique = len(set(self.depths)) == len(self.depths)
        if not self.depths or not unique or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(
                f"benchmark.depths={list(self.depths)} must name one or more different depths, each from 0 "
                "(start) to 100 (end) percent"
            )
        for field, least in (("examples_per_depth", 1), ("max_new_tokens", 1), ("buffer_tokens", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"benchmark.{field}={value} must be at least {least}")

    def _check_texts(self) -> None:
        for field in ("needle", "question", "answer"):
            if not getattr(self, field).strip():
                raise ValueError(f"benchmark.{field} is empty: it must be a text")
        words = set(self.needle.lower().split())
        strange = [word for word in self.answer.split() if word.lower() not in words]
        if strange:
            raise ValueError(
                f"benchmark.answer has {strange[0]!r}, which is no word of benchmark.needle={self.needle!r}; "
                "set both, with the same punctuation"
            )
        for name in FIELDS:
            if name in self.question and name not in self.needle:
                raise ValueError(f"benchmark.question has {name} and benchmark.needle lacks it: set both")
        if self.system is not None and self.protocol != "chat":
            raise ValueError(
                f"benchmark.system has no effect with benchmark.protocol={self.protocol}; set protocol=chat"
            )
        drawn = self.haystack is None or any(name in self.needle for name in FIELDS)
        if self.examples_per_depth > 1 and not drawn:
            raise ValueError(
                f"benchmark.examples_per_depth={self.examples_per_depth} would repeat one prompt: put "
                "{key} or {value} into benchmark.needle, or set benchmark.haystack=null"
            )

    def prompt_lengths(self) -> tuple[int, ...] | None:
        """The lengths asked for; unknown where the prompt is more or less than what they count."""
        exact = self.query_aware and self.protocol == "plain" and self.buffer_tokens is None
        return self._chosen() if exact else None

    def identity(self) -> dict[str, Any]:
        """The content of the haystack's files."""
        if self.haystack is None:
            return {"haystack_content": "generated"}
        return {"haystack_content": records.content_digest(self.files())}

    def files(self) -> list[Path]:
        """The haystack's files, in the order they are read in; none where it is generated.

        Raises:
            DataError: there is no such file or directory, or no text in it.
        """
        if self.haystack is None:
            return []
        place = Path(self.haystack).expanduser()
        found = [place] if place.is_file() else sorted(place.glob("*.txt"))
        if not found:
            raise DataError(
                f"benchmark.haystack={self.haystack} is neither a file nor a directory with *.txt files; "
                "name one, or null for generated prose"
            )
        return found

    def notes(self) -> list[str]:
        """What the text is, where it is not our own."""
        if self.haystack is None:
            return []
        files = self.files()
        size = sum(path.stat().st_size for path in files)
        return [f"haystack of {len(files)} files, {size} bytes, as often as a line's `repeats` says"]

    def examples(self, tokenizer: Any | None) -> list[Example]:
        """Length by length: every depth once, then once more; the same on every machine.

        Raises:
            ValueError: a length too short for needle and question.
            DataError: a haystack that can't be read.
        """
        tokens = Tokens(tokenizer)
        text = Prose(tokens) if self.haystack is None else Files(tokens, self.files())
        return [
            self._example(length, depth, index, tokens, text)
            for length in self._chosen()
            for index, depth in islice(product(range(self.examples_per_depth), self.depths), self.limit)
        ]

    def _chosen(self) -> tuple[int, ...]:
        return tuple(length for length in self.lengths if not self.tasks or _task(length) in self.tasks)

    def _example(self, length: int, depth: float, index: int, tokens: Tokens, text: Prose | Files) -> Example:
        """Every example has a generator of its own, so that no setting of how many changes any."""
        name = f"{self.seed}-needle-{length}-{depth:g}-{index}"
        rng = Random(name)
        key, value = Keys(rng).new(), new_value(rng)
        needle, question, answer = (
            part.replace("{key}", key).replace("{value}", value)
            for part in (self.needle, self.question, self.answer)
        )
        hay = text.ids(name, length)

        def context(room: int) -> str:
            """The first `room` tokens of the text with the needle, and what stands around them."""
            point = insertion(hay[:room], depth, tokens)
            before, after = tokens.text(hay[:point]), tokens.text(hay[point:room])
            return f"{self.prefix}{before}{needle}{after}{self.suffix}"

        room = self._room(length, len(hay), needle, question, context, tokens)
        return Example(
            task=_task(length),
            id=f"{depth:g}-{index}",
            context=context(room),
            question=question,
            answer_prefix="",
            answers=(answer if self.metric == "recall" else needle,),
            max_new_tokens=self.max_new_tokens,
            stop=("\n",),
            metric=self.metric,
            extra={
                "length": length,
                "depth": depth,
                "placed": round(100 * insertion(hay[:room], depth, tokens) / room, 2),
                "needle": needle,
                "rule": self.metric,
                "repeats": text.repeats(room),
            },
            chat=self.protocol == "chat",
            system=self.system,
        )

    def _room(
        self,
        length: int,
        most: int,
        needle: str,
        question: str,
        context: Callable[[int], str],
        tokens: Tokens,
    ) -> int:
        """Tokens of the text that go into a prompt of `length`.

        Raises:
            ValueError: none do.
        """
        around = tokens.count(self.prefix + self.suffix + question)
        if self.buffer_tokens is None:
            limit, least = length, tokens.count(self.prefix + needle + self.suffix + question)

            def measure(room: int) -> int:
                return tokens.count(context(room) + question)

        elif around > self.buffer_tokens:
            raise ValueError(
                f"benchmark.buffer_tokens={self.buffer_tokens} must be at least {around}, which prefix, "
                "suffix and question take; raise it, or null"
            )
        else:
            limit, least = length - self.buffer_tokens, len(tokens.ids(needle))

            def measure(room: int) -> int:
                inside = context(room).removeprefix(self.prefix).removesuffix(self.suffix)
                return len(tokens.ids(inside))

        found = fitted(measure, limit, limit - least, most)
        if found is None:
            raise ValueError(
                f"benchmark.lengths={length} is too short: needle, question and what stands around them "
                f"take {length - limit + least} tokens; raise it"
            )
        return found

    def score(self, example: Example | str, prediction: str, answers: Any, **extra: Any) -> float:
        """Share of the answer's words that the response has, or ROUGE-1 F against the needle.

        Args:
            answers: one text: the answer for `recall`, the needle for `rouge1`.
            extra: `rule` or `metric`, which of the two; without, the setting.

        Raises:
            ValueError: an unknown task or rule, or not one text.
        """
        task = example if isinstance(example, str) else example.task
        kind, _, length = task.partition("_")
        if kind != "needle" or not (length.isdigit() or task == kind):
            raise ValueError(f"benchmark 'needle': {unknown_name('task', task, map(_task, self.lengths))}")
        known = extra if isinstance(example, str) else example.extra
        rule = known.get("rule") or known.get("metric") or self.metric
        if rule not in SCORES:
            raise ValueError(f"benchmark 'needle': {unknown_name('rule', str(rule), SCORES)}")
        right = texts_of(answers)
        if len(right) != 1:
            raise ValueError(f"benchmark 'needle' compares with one text; got {len(right)}")
        return SCORES[rule](prediction, right[0])

    def aggregates(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
        """`overall`, the mean of the grid, and the same of every length and of every depth."""
        grid: dict[tuple[int, float], list[float]] = {}
        for line in lines:
            grid.setdefault((line["length"], line["depth"]), []).append(line["score"])
        found: dict[str, Tree] = {"overall": list(grid.values())} if grid else {}
        for length in sorted({place[0] for place in grid}):
            found[f"length_{length}"] = [scores for place, scores in grid.items() if place[0] == length]
        for depth in sorted({place[1] for place in grid}):
            found[f"depth_{depth:g}"] = [scores for place, scores in grid.items() if place[1] == depth]
        return found


def _task(length: int) -> str:
    return f"needle_{length}"
